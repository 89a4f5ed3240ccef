"""Prompt caches for mlx-lm, and the patch of its attention call that lets them compute attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import InputError, PresetError, UnsupportedError, suggest
from mlxkv.live.base import LayerCache, cache_class_of, live_methods
from mlxkv.live.group import CacheGroup
from mlxkv.models import cache_spec
from mlxkv.models.probe import ATTENTION, LOCK, attention_modules
from mlxkv.presets import method_preset, preset_names, presets_of

_LISTING = "mlxkv presets --all"


class CacheEntry(Protocol):
    """One layer's entry in a prompt cache: a `LayerCache`, or one of mlx-lm's own caches for other layers."""

    @property
    def state(self) -> Any:
        """All arrays held, for `mx.eval`."""

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays held."""

    def empty(self) -> bool:
        """Return whether no token has been seen.

        Returns
        -------
        bool
            True before the first chunk.
        """

    def is_trimmable(self) -> bool:
        """Return whether the last tokens can be removed.

        Returns
        -------
        bool
            True if they can. The answer may change as more tokens arrive.
        """


def make_cache(model: Any, method: str | Config, **overrides: Any) -> list[CacheEntry]:
    """Make a prompt cache for mlx-lm's `generate(..., prompt_cache=...)`, and call `attach(model)`.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    method
        The name of a preset, the name of a live method (for its default settings), or the settings of a live method.
    **overrides
        Single settings to replace.

    Returns
    -------
    list of CacheEntry
        mlx-lm's own prompt cache of the model with a `LayerCache` in place of each entry that keeps the keys and values of all
        tokens and, with methods that can, of each with a sliding window. Other entries (convolutions, indexers) stay.

    Raises
    ------
    PresetError
        For an unknown name, a codec's preset, and unknown or impossible settings.
    InputError
        For settings that belong to no live method.
    UnsupportedError
        For a model that live caches do not support, or a method that does not support this model.
    """
    cache_class, config = _resolve_method(method, overrides)
    return make_cache_of(model, cache_class, config)


def make_cache_of(model: Any, cache_class: type[LayerCache], config: Config) -> list[CacheEntry]:
    """Make a prompt cache of a method's class, which need not be registered, and call `attach(model)`.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    cache_class
        The method.
    config
        Its settings.

    Returns
    -------
    list of CacheEntry
        As `make_cache` returns them.

    Raises
    ------
    UnsupportedError
        For a model that live caches do not support, or a method that does not support this model.
    """
    spec = cache_spec(model)
    methods = dict.fromkeys(spec.attention_layers, (cache_class, config))
    if (windowed := cache_class.in_windows(config)) is not None:
        methods |= dict.fromkeys(spec.window_layers, windowed)
    return assemble_cache(model, methods)


def assemble_cache(model: Any, methods: Mapping[int, tuple[type[LayerCache], Config]]) -> list[CacheEntry]:
    """Make a prompt cache whose layers may have different methods, and call `attach(model)`.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    methods
        Method and settings of each layer that gets a live cache, by its index in `CacheSpec.layers`. The others keep mlx-lm's
        own.

    Returns
    -------
    list of CacheEntry
        As `make_cache` returns them.

    Raises
    ------
    UnsupportedError
        For a model that live caches do not support, a method that does not support this model or one of these layers, and
        where only some of the layers with a sliding window get a live cache.
    """
    spec = cache_spec(model)
    caches = make_prompt_cache(model)
    windows = [layer in methods for layer in spec.window_layers]
    if any(windows) and not all(windows):
        raise UnsupportedError("layers with a sliding window share a mask: give live caches to all of them or to none")
    live = {layer: methods[layer][0](methods[layer][1], spec, layer) for layer in sorted(methods)}
    others = {i: entry for i, entry in enumerate(stock.entries(caches)) if i not in live}
    group = CacheGroup(others, model, _list_with(caches, min(live, default=0)))
    for entry in live.values():
        entry.join(group)
    attach(model)
    return stock.with_entries(caches, live)


def _list_with(caches: Sequence[Any], layer: int) -> range:
    """Return the indices of the entries in one list with an entry, itself included."""
    first = 0
    for entry in caches:
        indices = range(first, first + len(stock.entries([entry])))
        if layer in indices:
            return indices
        first = indices.stop
    return range(0)


def live_config(method: str | Config, **overrides: Any) -> Config:
    """Return the settings that `make_cache` would use.

    Parameters
    ----------
    method
        The name of a preset, the name of a live method (for its default settings), or the settings of a live method.
    **overrides
        Single settings to replace.

    Returns
    -------
    Config
        Settings of a live method.

    Raises
    ------
    PresetError
        For an unknown name, a codec's preset, and unknown or impossible settings.
    InputError
        For settings that belong to no live method.
    """
    return _resolve_method(method, overrides)[1]


def _resolve_method(method: str | Config, overrides: dict[str, Any]) -> tuple[type[LayerCache], Config]:
    """Return the class and the settings that a preset, a method or settings stand for."""
    if isinstance(method, Config):
        cache_class, config = cache_class_of(method), method
    else:
        cache_class, config = _named_method(method)
    try:
        return cache_class, config.replace(**overrides)
    except InputError as error:
        raise PresetError(f"{method}: {error}") from None


def _named_method(name: str) -> tuple[type[LayerCache], Config]:
    """Return the class and the settings of a preset, or of the live method of that name."""
    if name not in preset_names("methods"):
        if (found := live_methods.find(name)) is None:
            raise PresetError(f"no preset or live method {name[:80]!r}", suggest(name, _live_names(), _LISTING))
        return found, found.config_class()
    preset = method_preset(name)
    if (found := live_methods.find(preset.method)) is None:
        raise PresetError(
            f"preset {name!r} is of method {preset.method!r}, which is not a live method",
            suggest(preset.method, _live_names(), _LISTING),
        )
    return found, preset.config(found.config_class)


def _live_names() -> list[str]:
    """Return what `make_cache` takes: presets of live methods, and the methods themselves."""
    methods = live_methods.names()
    return [*methods, *presets_of(methods)]


def attach(model: Any) -> None:
    """Patch mlx-lm's attention call so that live caches compute the attention of this model.

    The patch replaces `scaled_dot_product_attention` in the Python modules that define the model, so it applies to all
    models that use the same modules. Other caches still get mlx-lm's own attention. Attaching a second time changes
    nothing; `detach` removes the patch.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    """
    with LOCK:
        for module in attention_modules(model):
            original = getattr(module, ATTENTION)
            if not hasattr(original, "__wrapped__"):
                setattr(module, ATTENTION, _with_live_caches(original))


def detach(model: Any) -> None:
    """Remove the patch of mlx-lm's attention call.

    Live caches of the model then raise UnsupportedError on their second use.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    """
    with LOCK:
        for module in attention_modules(model):
            attached = getattr(module, ATTENTION)
            setattr(module, ATTENTION, getattr(attached, "__wrapped__", attached))


def _with_live_caches(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Wrap mlx-lm's attention so that live caches compute it themselves."""

    @functools.wraps(original)
    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, *args: Any, **kwargs: Any
    ) -> mx.array:
        if hasattr(cache, "attend"):
            return cache.attend(queries, keys, values, *args, **kwargs)
        return original(queries, keys, values, cache, *args, **kwargs)

    return attention

"""The seam into mlx-lm: prompt caches whose attention layers are live, and the attention call that lets them attend."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv.config import Config
from mlxkv.errors import InputError, PresetError
from mlxkv.live.base import cache_class_of, live_methods
from mlxkv.models import cache_spec
from mlxkv.presets import method_preset, preset_names

_ATTENTION = "scaled_dot_product_attention"


def make_cache(model: Any, method: str | Config, **overrides: Any) -> list[Any]:
    """A prompt cache for mlx-lm's `generate(..., prompt_cache=...)`, one entry a layer.

    method: the name of a preset, or of a method for its default settings, or a method's settings; overrides replace
    single settings. Layers whose state is not keys and values (convolutions) keep mlx-lm's own cache. Installs
    `attach(model)`. Raises PresetError for unknown names and settings, UnsupportedError for a model or method that
    cannot be live.
    """
    config, spec = live_config(method, **overrides), cache_spec(model)
    cache_class = cache_class_of(config)
    caches = make_prompt_cache(model)
    for layer in spec.attention_layers:
        caches[layer] = cache_class(config, spec, layer)
    attach(model)
    return caches


def live_config(method: str | Config, **overrides: Any) -> Config:
    """Settings of the live method that a preset names, or else of the method of that name; overrides replace single ones.

    Raises PresetError listing presets and methods for another name, for a codec's preset and for unknown settings.
    """
    config = method if isinstance(method, Config) else _named_config(method)
    try:
        return config.replace(**overrides)
    except InputError as error:
        raise PresetError(f"{method}: {error}") from None


def _named_config(name: str) -> Config:
    if name not in preset_names("methods"):
        if (found := live_methods.find(name)) is None:
            known = ", ".join(sorted({*preset_names("methods"), *live_methods.names()}))
            raise PresetError(f"no preset or live method {name!r}; there are {known}")
        return found.config_class()
    preset = method_preset(name)
    if (found := live_methods.find(preset.method)) is None:
        raise PresetError(
            f"{name!r} compresses whole caches and is not a live method: those are {', '.join(live_methods.names())}"
        )
    return preset.config(found.config_class)


def attach(model: Any) -> None:
    """Let live caches compute the attention of this model, and of all others that mlx-lm implements by its modules.

    Other caches get mlx-lm's own attention, as before. Attaching twice is attaching once; `detach` undoes it.
    """
    for module in _attention_modules(model):
        original = getattr(module, _ATTENTION)
        if not hasattr(original, "__wrapped__"):
            setattr(module, _ATTENTION, _with_live_caches(original))


def detach(model: Any) -> None:
    """Put mlx-lm's own attention back. Live caches of the model then raise UnsupportedError on their second use."""
    for module in _attention_modules(model):
        setattr(module, _ATTENTION, getattr(getattr(module, _ATTENTION), "__wrapped__", getattr(module, _ATTENTION)))


def _attention_modules(model: Any) -> Iterator[ModuleType]:
    """The Python modules that define the model's parts and call attention by a name of their own."""
    names = {kind.__module__ for part in model.modules() for kind in type(part).__mro__}
    return (sys.modules[name] for name in sorted(names) if hasattr(sys.modules[name], _ATTENTION))


def _with_live_caches(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @functools.wraps(original)
    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, *args: Any, **kwargs: Any
    ) -> mx.array:
        if hasattr(cache, "attend"):
            return cache.attend(queries, keys, values, *args, **kwargs)
        return original(queries, keys, values, cache, *args, **kwargs)

    return attention

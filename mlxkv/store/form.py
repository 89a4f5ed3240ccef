"""What the store has to know of a model's cache: where it can be cut, and of which types it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlxkv import stock
from mlxkv.config import Config
from mlxkv.errors import UnsupportedError
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import make_cache
from mlxkv.models import cache_spec
from mlxkv.spec import CacheSpec

BLOCK_TOKENS = 512  # of a slot, which blocks never span
LAST_CUT, LEAST_TOKENS = 448, 64  # of a slot: where a cut is at the latest; tokens of a block before a cut at least
_DO = "full, int8, int4 and kivi keep every token as it is"


@dataclass(frozen=True)
class CacheForm:
    """Form of a model's prompt cache.

    Parameters
    ----------
    spec
        Description of the cache.
    types
        MLX's type of the keys of each entry; None for entries without.
    states
        Whether there are other states than keys and values, which cannot be cut.
    live
        Method and settings of the live caches that the model runs with; empty for caches that hold what mlx-lm's own would.
    """

    spec: CacheSpec
    types: tuple[mx.Dtype | None, ...]
    states: bool
    live: str = ""

    @property
    def dtype(self) -> str:
        """Type that holds the values of all layers."""
        names = {str(kind).removeprefix("mlx.core.") for kind in self.types if kind is not None}
        return names.pop() if len(names) == 1 else "float32"

    @property
    def window(self) -> int:
        """Tokens of the largest sliding window; 0 without one."""
        return max((group.window or 0 for group in self.spec.groups), default=0)

    @property
    def cut_anywhere(self) -> bool:
        """Whether a cache of a text is one of each of its beginnings."""
        return not self.states and not self.window

    def rows_from(self, firsts: dict[int, int]) -> int:
        """Return from which position on the rows of windows are complete, as if all windows were as large as the largest.

        Parameters
        ----------
        firsts
            Position of the first row that is there, by the number of the group.

        Returns
        -------
        int
            A text can go on from p tokens if this is at most p - `window`, or 0.
        """
        least = 0
        for number, first in firsts.items():
            if (window := self.spec.groups[number].window) is not None:
                least = max(least, first - (self.window - window))
        return least


def form_of(model: Any, method: str | Config | None = None) -> CacheForm:
    """Return the form of a model's prompt cache.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    method
        Preset or settings of the live caches that it runs with; None for mlx-lm's own.

    Returns
    -------
    CacheForm
        The form.

    Raises
    ------
    UnsupportedError
        For caches that cannot be copied, and live ones that do not keep every token.
    PresetError
        For an unknown method.
    """
    spec = cache_spec(model)
    entries = stock.entries(make_prompt_cache(model))
    for index, (entry, layer) in enumerate(zip(entries, spec.layers)):
        kind = type(entry)
        if layer is None:
            fits = entry is None or (kind in stock.SAVED and kind is not ChunkedKVCache)
        else:
            fits = kind is (KVCache if layer.window is None else RotatingKVCache) and not getattr(entry, "keep", 0)
        if not fits:
            raise UnsupportedError(
                f"layer {index} of this {spec.model_type} model keeps a {kind.__name__}, of which parts cannot be copied",
                "serve it without a store (--no-store)",
            )
    live = "" if method is None else _live_form(model, method)
    examples = stock.entries(stock.example_caches(model))
    types = tuple(None if layer is None else entry.keys.dtype for entry, layer in zip(examples, spec.layers))
    # Some models make caches for layers that never fill them.
    others = [entry for entry, layer in zip(examples, spec.layers) if layer is None and entry is not None]
    states = any(type(entry) is not KVCache or entry.keys is not None for entry in others)
    return CacheForm(spec, types, states, live)


def _live_form(model: Any, method: str | Config) -> str:
    """Describe live caches; refuse those that give tokens up, or go by the attention that they get."""
    found = [entry for entry in stock.entries(make_cache(model, method)) if isinstance(entry, LayerCache)]
    for entry in found:
        if entry.observation_window or not entry.any_use:
            raise UnsupportedError(
                f"{entry.method_name} does not keep every token, which a store of prompts needs", _DO
            )
    settings = {f"{entry.method_name} {json.dumps(entry.config.to_dict(), sort_keys=True)}" for entry in found}
    return " ".join(sorted(settings)) if {entry.method_name for entry in found} - {"full"} else ""

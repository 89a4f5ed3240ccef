"""Description of a model's whole cache, and its form in files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlxkv.errors import FormatError, MismatchError, UnsupportedError
from mlxkv.spec.bounds import MAX_LAYERS, check_text, is_int
from mlxkv.spec.layers import Group, Layer, Slot, Stream
from mlxkv.spec.rope import Rope

MODES = ("dual_stream", "single_stream")


@dataclass(frozen=True)
class CacheSpec:
    """Description of a model's cache.

    Parameters
    ----------
    model_type
        The mlx-lm module that implements the model, such as "qwen3".
    layers
        For each entry of the prompt cache, those within a list of caches counted one by one, a `Layer` or a pair of slots
        if it keeps keys and values, and None if it keeps other state (convolutions, recurrences); at most 4,096.
    mode
        What pairs of slots are: "dual_stream" for keys and values, "single_stream" for the latent and k_pe of multi-head
        latent attention (MLA). Afterwards it says what the layers of the main group are.

    Raises
    ------
    FormatError
        For an unknown mode, and for too many layers.
    UnsupportedError
        When no layer caches keys and values.

    Examples
    --------
    >>> pair = Slot("keys", 2, 8, Rope(8, base=10000.0)), Slot("values", 2, 8)
    >>> spec = CacheSpec("llama", (None, pair, pair))
    >>> spec.attention_layers, spec.stream("v").width
    ((1, 2), 32)
    >>> CacheSpec.from_json(spec.to_json()) == spec
    True
    >>> CacheSpec("gemma3", (Layer(*pair, window=512), pair)).groups[1].window
    512
    """

    model_type: str
    layers: tuple[Layer | None, ...]
    mode: str = MODES[0]

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FormatError(f"unknown cache mode {self.mode!r}; known: {', '.join(MODES)}")
        if len(self.layers) > MAX_LAYERS:
            raise FormatError(f"a cache of {len(self.layers)} layers: there may be at most {MAX_LAYERS}")
        latent = self.mode == MODES[1]
        kinds: dict[Any, Layer] = {}  # equal pairs become one object
        layers = tuple(_as_layer(layer, latent, kinds) for layer in self.layers)
        object.__setattr__(self, "layers", layers)
        if not any(layer is not None and layer.keys.dim for layer in layers):
            raise UnsupportedError(f"no layer of this {self.model_type} model keeps a key/value cache")
        object.__setattr__(self, "mode", MODES[self.groups[0].latent])

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Layers that are coded together: the main group, then the others in the order of their first layers.

        The main group are the layers of the commonest shape, of those that keep all tokens if there are any.
        """
        shapes: dict[tuple[Any, ...], list[int]] = {}
        for index, layer in enumerate(self.layers):
            if layer is not None:
                shapes.setdefault(layer.shape, []).append(index)
        whole = Counter({shape: len(found) for shape, found in shapes.items() if shape[1] is None})
        counts = whole or Counter({shape: len(found) for shape, found in shapes.items()})
        main = counts.most_common(1)[0][0]
        ordered = [main, *(shape for shape in shapes if shape != main)]
        return tuple(Group(tuple(shapes[s]), tuple(self.layers[i] for i in shapes[s])) for s in ordered)  # type: ignore[misc]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep the keys and values of all tokens."""
        return tuple(i for i, layer in enumerate(self.layers) if layer is not None and layer.window is None)

    @property
    def window_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep the keys and values of the newest tokens."""
        return tuple(i for i, layer in enumerate(self.layers) if layer is not None and layer.window is not None)

    def stream(self, name: str) -> Stream:
        """Return one stream of the main group.

        Parameters
        ----------
        name
            "k" or "v".

        Returns
        -------
        Stream
            The stream; of width 0 for "v" of a single-stream cache.
        """
        return self.groups[0].stream(name)

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values.

        Returns
        -------
        dict
            The keys `model_type`, `mode`, `kinds` (each distinct layer once: its two slots, then what is unlike the mode) and
            `layers` (the index of each layer's kind, or None).
        """
        objects = {id(layer): layer for layer in self.layers if layer is not None}
        kinds: dict[Layer, int] = {}
        index = {key: kinds.setdefault(layer, len(kinds)) for key, layer in objects.items()}
        return {
            "model_type": self.model_type,
            "mode": self.mode,
            "kinds": [_layer_json(layer, self.mode) for layer in kinds],
            "layers": [None if layer is None else index[id(layer)] for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheSpec:
        """Return the inverse of `to_json`.

        Parameters
        ----------
        data
            Output of `to_json`, from any source.

        Returns
        -------
        CacheSpec
            The description.

        Raises
        ------
        FormatError
            When the data is not such a description.
        UnsupportedError
            When it describes a cache that mlxkv has no support for.
        """
        try:
            stored, indices, mode = data["kinds"], data["layers"], check_text(data["mode"])
            if not all(isinstance(part, list) and len(part) <= MAX_LAYERS for part in (stored, indices)):
                raise FormatError(f"kinds and layers of a cache are lists of at most {MAX_LAYERS}")
            if not all(i is None or is_int(i) for i in indices):
                raise FormatError("every layer is null or the number of a kind")
            kinds = [_layer_from_json(kind, mode) for kind in stored]
            layers = tuple(None if i is None else kinds[i] for i in indices)
            return cls(check_text(data["model_type"]), layers, mode)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise FormatError(f"not a cache description: {repr(error)[:200]}") from None


def _as_layer(layer: Any, latent: bool, kinds: dict[Any, Layer]) -> Layer | None:
    """Return a layer, or a pair of slots as one; equal ones are one object, so that they need not be compared again."""
    if layer is None:
        return None
    key = (layer.use, layer.selects, layer) if isinstance(layer, Layer) else layer
    return kinds.setdefault(key, layer if isinstance(layer, Layer) else Layer(layer[0], layer[1], latent))


def _layer_json(layer: Layer, mode: str) -> list[Any]:
    """Return a layer's slots and, where there is any, what its mode does not say."""
    more: dict[str, Any] = {} if layer.latent == (mode == MODES[1]) else {"latent": layer.latent}
    if layer.window is not None:
        more["window"] = layer.window
    return [*map(_slot_json, layer), *([more] if more else [])]


def _layer_from_json(kind: Any, mode: str) -> Layer:
    if not isinstance(kind, list) or len(kind) not in (2, 3):
        raise FormatError("every attention layer needs exactly two slots")
    more = kind[2] if len(kind) == 3 else {}
    if not set(more) <= {"latent", "window"}:
        raise FormatError(
            f"a layer of a cache has {str(sorted(more))[:80]}, which this mlxkv does not know: upgrade it"
        )
    latent, window = more.get("latent", mode == MODES[1]), more.get("window")
    return Layer(_slot_from_json(kind[0]), _slot_from_json(kind[1]), latent, window)


def _slot_json(slot: Slot) -> dict[str, Any]:
    rope = None if slot.rope is None else slot.rope.to_json()
    return {"name": slot.name, "heads": slot.heads, "dim": slot.dim, "rope": rope}


def _slot_from_json(data: Mapping[str, Any]) -> Slot:
    rope = None if data["rope"] is None else Rope.from_json(data["rope"])
    return Slot(check_text(data["name"]), data["heads"], data["dim"], rope)


def check_rope(spec: CacheSpec, stated: Rope | Mapping[str, Any]) -> None:
    """Check an expected rotation against that of a model's cache.

    Parameters
    ----------
    spec
        Description of the model's cache.
    stated
        Expected rotation, or some of its fields by name, as in a model preset.

    Raises
    ------
    MismatchError
        When a layer's keys are rotated otherwise.
    """
    facts = stated.to_json() if isinstance(stated, Rope) else stated
    for rope in set(spec.stream("k").ropes):
        found = {} if rope is None else rope.to_json()
        wrong = {key: value for key, value in facts.items() if found.get(key) != value}
        if wrong:
            shown = {key: found.get(key) for key in wrong}
            raise MismatchError(
                f"the rotation differs: expected {wrong}, the cache has {shown if rope else 'no rope at all'}"
            )

"""Descriptions of a cache, outside any model: rotation, slots, layers.

It depends neither on mlx-lm nor on files or codecs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import _deprecated
from mlxkv.errors import FormatError, MismatchError, UnsupportedError

MODES = ("dual_stream", "single_stream")
STREAMS = ("k", "v")
# Bounds on what a description may say, since files of any source hold one; they are far above those of any model.
MAX_LAYERS, MAX_HEADS, MAX_DIM = 4096, 2**14, 2**14
LEAST_ROPE, MOST_ROPE = 1e-6, 1e6  # of a rotation's numbers: angles stay finite in float32 at every int32 position


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding as `mx.fast.rope` applies it, and its inverse.

    Parameters
    ----------
    dims
        How many dimensions are rotated; even, 2 to 16,384.
    offset
        First rotated dimension within the last axis.
    base
        Base of the geometric series of periods, 1e-6 or more. Exactly one of `base` and `freqs` is given.
    freqs
        Periods over 2 pi of each pair of dimensions, `dims / 2` numbers, as `mx.fast.rope` takes them, 1e-6 or more; infinite ones
        leave their pair unrotated.
    traditional
        True pairs neighbouring dimensions, False pairs the two halves.
    scale
        Factor on positions, 1e-6 to 1e6.
    gain
        Factor on the rotated dimensions before rotation (`mscale` of YaRN and LongRoPE), 1e-6 to 1e6.

    Raises
    ------
    FormatError
        When the fields do not describe a rotation.

    Notes
    -----
    Su et al., RoFormer (arXiv 2104.09864). Angles depend on the position alone, so a rotation can be undone; dynamic NTK
    scaling is not of this kind.

    Examples
    --------
    >>> import mlx.core as mx
    >>> rope = Rope(4, base=10000.0)
    >>> keys = mx.ones((1, 1, 3, 4))  # [B, H, T, D]
    >>> mx.allclose(rope.unrotate(rope.rotate(keys, start=7), start=7), keys, atol=1e-5).item()
    True
    """

    dims: int
    offset: int = 0
    base: float | None = None
    freqs: tuple[float, ...] | None = None
    traditional: bool = False
    scale: float = 1.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not (is_int(self.dims, 2, MAX_DIM) and is_int(self.offset, 0, MAX_DIM)) or self.dims % 2:
            raise FormatError(f"rope needs even dims > 0 and offset >= 0, got {self.dims!r} and {self.offset!r}")
        if type(self.traditional) is not bool:
            raise FormatError(f"rope's traditional is true or false, not {self.traditional!r}")
        if (self.base is None) == (self.freqs is None):
            raise FormatError("rope needs either a base or a table of freqs, not both and not none")
        if self.freqs is not None and len(self.freqs) != self.dims // 2:
            raise FormatError(f"rope of {self.dims} dims needs {self.dims // 2} freqs, got {len(self.freqs)}")
        if wrong := [f for f in self.freqs or () if not _is_between(f, LEAST_ROPE, np.inf)]:
            raise FormatError(f"rope needs freqs of {LEAST_ROPE} or more, got {wrong[0]!r}")
        if self.base is not None and not _is_between(self.base, LEAST_ROPE, float(np.finfo(np.float32).max)):
            raise FormatError(f"rope needs a base of {LEAST_ROPE} or more that float32 holds, got {self.base!r}")
        if not all(_is_between(n, LEAST_ROPE, MOST_ROPE) for n in (self.scale, self.gain)):
            raise FormatError(f"rope needs scale and gain of 1e-6 to 1e6, got {self.scale!r} and {self.gain!r}")

    def rotate(self, x: mx.array, start: int | mx.array = 0) -> mx.array:
        """Rotate keys as the model does.

        Parameters
        ----------
        x
            Keys `[B, H, T, D]`.
        start
            Position of the first token; an int, or int32 `[B]` with one for each sequence.

        Returns
        -------
        mx.array
            Rotated keys `[B, H, T, D]` of the same type.
        """
        return self._apply(x, start, float(self.scale), float(self.gain), gain_first=True)

    def unrotate(self, x: mx.array, start: int | mx.array = 0) -> mx.array:
        """Undo `rotate`.

        Parameters
        ----------
        x
            Rotated keys `[B, H, T, D]`; in float32 the round trip errs by about 5e-7.
        start
            Position of the first token, as for `rotate`.

        Returns
        -------
        mx.array
            Keys `[B, H, T, D]` as they were before the rotation.
        """
        return self._apply(x, start, -float(self.scale), 1.0 / self.gain, gain_first=False)

    def _apply(self, x: mx.array, start: int | mx.array, scale: float, gain: float, gain_first: bool) -> mx.array:
        """Rotate by positions times `scale`, with the gain before or after."""
        end = self.offset + self.dims
        part = x[..., self.offset : end]
        if gain_first and gain != 1.0:
            part = part * gain
        freqs = None if self.freqs is None else mx.array(self.freqs, dtype=mx.float32)
        base = None if self.base is None else float(self.base)
        part = mx.fast.rope(
            part, self.dims, traditional=self.traditional, base=base, scale=scale, offset=start, freqs=freqs
        )
        if not gain_first and gain != 1.0:
            part = part * gain
        if self.offset == 0 and end == x.shape[-1]:
            return part
        return mx.concatenate([x[..., : self.offset], part, x[..., end:]], axis=-1)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values.

        Returns
        -------
        dict
            Fields by name; infinite `freqs` become None.
        """
        out = dataclasses.asdict(self)
        if self.freqs is not None:
            out["freqs"] = [None if np.isinf(f) else f for f in self.freqs]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rope:
        """Return the inverse of `to_json`.

        Parameters
        ----------
        data
            Fields by name.

        Returns
        -------
        Rope
            The rotation.

        Raises
        ------
        FormatError
            When the fields do not describe a rotation. Unknown or missing names raise TypeError, as for any dataclass.
        """
        fields = dict(data)
        if fields.get("freqs") is not None:
            fields["freqs"] = tuple(float("inf") if f is None else f for f in fields["freqs"])
        return cls(**fields)


def _is_between(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


@dataclass(frozen=True)
class Slot:
    """One cached tensor of a layer, `[B, heads, T, dim]`.

    Parameters
    ----------
    name
        Readable name, such as "keys" or "latent".
    heads
        Number of key/value heads; 1 to 16,384.
    dim
        Width of one head, up to 16,384; 0 for a slot that is not used.
    rope
        Its rotation; None where it is not rotated.

    Raises
    ------
    FormatError
        When the numbers are out of range or the rotation is wider than the slot.
    """

    name: str
    heads: int
    dim: int
    rope: Rope | None = None

    def __post_init__(self) -> None:
        if not (is_int(self.heads, 1, MAX_HEADS) and is_int(self.dim, 0, MAX_DIM)):
            raise FormatError(f"slot {self.name!r} cannot have {self.heads!r} heads of {self.dim!r} dims")
        if self.rope is not None and self.rope.offset + self.rope.dims > self.dim:
            raise FormatError(f"slot {self.name!r} rotates past its {self.dim} dims: {str(self.rope)[:80]}")


@dataclass(frozen=True)
class Stream:
    """Keys (or values) of all caching layers and heads together, which one PCA basis covers.

    Parameters
    ----------
    name
        "k" or "v".
    heads
        Number of key/value heads of a layer.
    dim
        Width of one head.
    ropes
        Rotation of each caching layer, None where it has none.

    Examples
    --------
    >>> Stream("k", heads=2, dim=8, ropes=(None,) * 3).width
    48
    """

    name: str
    heads: int
    dim: int
    ropes: tuple[Rope | None, ...]

    @property
    def layers(self) -> int:
        """Number of caching layers."""
        return len(self.ropes)

    @property
    def width(self) -> int:
        """Width p of a token row: layers * heads * dim."""
        return self.layers * self.heads * self.dim


@dataclass(frozen=True)
class CacheSpec:
    """Description of a model's cache.

    Parameters
    ----------
    model_type
        The mlx-lm module that implements the model, such as "qwen3".
    layers
        Two slots for each layer that keeps keys and values, None for layers with other state (convolutions); at most
        4,096 layers.
    mode
        "dual_stream" codes the two slots apart, as keys and values. "single_stream" joins them along the last axis into
        the k stream (MLA: latent | k_pe), and the v stream has width 0.

    Raises
    ------
    FormatError
        For an unknown mode, and for too many layers.
    UnsupportedError
        When no layer caches keys and values, or layers cache different shapes.

    Examples
    --------
    >>> pair = Slot("keys", 2, 8, Rope(8, base=10000.0)), Slot("values", 2, 8)
    >>> spec = CacheSpec("llama", (None, pair, pair))
    >>> spec.attention_layers, spec.stream("v").width
    ((1, 2), 32)
    >>> CacheSpec.from_json(spec.to_json()) == spec
    True
    """

    model_type: str
    layers: tuple[tuple[Slot, Slot] | None, ...]
    mode: str = "dual_stream"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FormatError(f"unknown cache mode {self.mode!r}; known: {', '.join(MODES)}")
        if len(self.layers) > MAX_LAYERS:
            raise FormatError(f"a cache of {len(self.layers)} layers: there may be at most {MAX_LAYERS}")
        shapes = {tuple((slot.heads, slot.dim) for slot in slots) for slots in self.layers if slots is not None}
        if not any(first[1] for first, _ in shapes):
            raise UnsupportedError(f"no layer of this {self.model_type} model keeps a key/value cache")
        if len(shapes) > 1:
            raise UnsupportedError(f"{self.model_type} caches differently shaped layers: {sorted(shapes)}")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values."""
        return tuple(i for i, slots in enumerate(self.layers) if slots is not None)

    def stream(self, name: str) -> Stream:
        """Return one stream across all attention layers.

        Parameters
        ----------
        name
            "k" or "v".

        Returns
        -------
        Stream
            The stream; of width 0 for "v" of a single-stream cache.
        """
        return self._streams[name]

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        """Both streams by name."""
        pairs = [slots for slots in self.layers if slots is not None]
        first, second = pairs[0]
        if self.mode == "dual_stream":
            return {
                name: Stream(name, slot.heads, slot.dim, tuple(pair[index].rope for pair in pairs))
                for index, (name, slot) in enumerate(zip(STREAMS, (first, second)))
            }
        joined = {id(pair): _concat_rope(*pair) for pair in pairs}  # layers of one kind share their pair
        ropes = tuple(joined[id(pair)] for pair in pairs)
        return {
            "k": Stream("k", first.heads, first.dim + second.dim, ropes),
            "v": Stream("v", first.heads, 0, (None,) * len(pairs)),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain JSON values.

        Returns
        -------
        dict
            The keys `model_type`, `mode`, `kinds` (each distinct pair of slots once) and `layers` (the index of each layer's
            kind, or None).
        """
        objects = {id(slots): slots for slots in self.layers if slots is not None}
        kinds: dict[tuple[Slot, Slot], int] = {}
        index = {key: kinds.setdefault(slots, len(kinds)) for key, slots in objects.items()}
        return {
            "model_type": self.model_type,
            "mode": self.mode,
            "kinds": [[_slot_json(slot) for slot in slots] for slots in kinds],
            "layers": [None if slots is None else index[id(slots)] for slots in self.layers],
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
            stored, indices = data["kinds"], data["layers"]
            if not all(isinstance(part, list) and len(part) <= MAX_LAYERS for part in (stored, indices)):
                raise FormatError(f"kinds and layers of a cache are lists of at most {MAX_LAYERS}")
            if not all(i is None or is_int(i) for i in indices):
                raise FormatError("every layer is null or the number of a kind")
            if any(len(kind) != 2 for kind in stored):
                raise FormatError("every attention layer needs exactly two slots")
            kinds = [(_slot_from_json(first), _slot_from_json(second)) for first, second in stored]
            layers = tuple(None if i is None else kinds[i] for i in indices)
            return cls(_text(data["model_type"]), layers, _text(data["mode"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise FormatError(f"not a cache description: {repr(error)[:200]}") from None


def _text(value: Any) -> str:
    """Check that a value read from a file is text and return it."""
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _concat_rope(first: Slot, second: Slot) -> Rope | None:
    """Return the rotation of two slots joined along the last axis."""
    if first.rope is not None and second.rope is not None:
        raise UnsupportedError("a single stream can rotate only one of its two slots")
    if second.rope is not None:
        return dataclasses.replace(second.rope, offset=second.rope.offset + first.dim)
    return first.rope


def _slot_json(slot: Slot) -> dict[str, Any]:
    rope = None if slot.rope is None else slot.rope.to_json()
    return {"name": slot.name, "heads": slot.heads, "dim": slot.dim, "rope": rope}


def _slot_from_json(data: Mapping[str, Any]) -> Slot:
    rope = None if data["rope"] is None else Rope.from_json(data["rope"])
    return Slot(_text(data["name"]), data["heads"], data["dim"], rope)


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


def is_int(value: object, least: int = 0, most: int | None = None) -> bool:
    """Check whether a value is an int, and not a bool, in a range.

    Parameters
    ----------
    value
        Anything.
    least
        The smallest number allowed.
    most
        The largest number allowed; None for no bound.

    Returns
    -------
    bool
        True for such a number.

    Examples
    --------
    >>> is_int(3), is_int(True), is_int(3.0), is_int(0, least=1), is_int(9, most=8)
    (True, False, False, False, False)
    """
    return type(value) is int and value >= least and (most is None or value <= most)


__getattr__ = _deprecated.renamed(__name__, {"fingerprint": "identity:fingerprint"})

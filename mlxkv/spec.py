"""A description of a cache, outside any model: how slots are rotated and which layers cache what.

Knows nothing about mlx-lm, files or codecs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxkv.config import is_int
from mlxkv.errors import FormatError, MismatchError, UnsupportedError

MODES = ("dual_stream", "single_stream")
STREAMS = ("k", "v")


@dataclass(frozen=True)
class Rope:
    """A rotary embedding as `mx.fast.rope` applies it (Su et al., arXiv 2104.09864), and its inverse.

    dims: how many dimensions are rotated, starting at `offset` within the last axis.
    base, freqs: exactly one is set; `freqs` are periods over 2 pi, as in `mx.fast.rope`.
    traditional: True pairs neighbouring dimensions, False pairs the two halves.
    scale: multiplies positions. gain: multiplies the rotated dims first (YaRN's and LongRoPE's mscale).
    """

    dims: int
    offset: int = 0
    base: float | None = None
    freqs: tuple[float, ...] | None = None
    traditional: bool = False
    scale: float = 1.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        if not (is_int(self.dims) and is_int(self.offset)) or self.dims == 0 or self.dims % 2:
            raise FormatError(f"rope needs even dims > 0 and offset >= 0, got {self.dims} and {self.offset}")
        if type(self.traditional) is not bool:
            raise FormatError(f"rope's traditional is true or false, not {self.traditional!r}")
        if (self.base is None) == (self.freqs is None):
            raise FormatError("rope needs either a base or a table of freqs, not both and not none")
        if self.freqs is not None and len(self.freqs) != self.dims // 2:
            raise FormatError(f"rope of {self.dims} dims needs {self.dims // 2} freqs, got {len(self.freqs)}")
        if any(not f > 0 for f in self.freqs or ()):
            raise FormatError(f"rope needs freqs > 0, got {self.freqs}")
        if not all(_is_positive_float32(n) for n in (self.scale, self.gain, 1.0 if self.base is None else self.base)):
            raise FormatError(f"rope needs scale, gain and base > 0, got {self.scale}, {self.gain} and {self.base}")

    def rotate(self, x: mx.array, start: int | mx.array = 0) -> mx.array:
        """Rotate x `[B, H, T, D]` as the model does for positions start..start+T; start may be int32 `[B]`."""
        return self._apply(x, start, self.scale, self.gain, gain_first=True)

    def unrotate(self, x: mx.array, start: int | mx.array = 0) -> mx.array:
        """The inverse of `rotate`; call it on float32, where the round trip errs by about 5e-7."""
        return self._apply(x, start, -self.scale, 1.0 / self.gain, gain_first=False)

    def _apply(self, x: mx.array, start: int | mx.array, scale: float, gain: float, gain_first: bool) -> mx.array:
        end = self.offset + self.dims
        part = x[..., self.offset : end]
        if gain_first and gain != 1.0:
            part = part * gain
        freqs = None if self.freqs is None else mx.array(self.freqs, dtype=mx.float32)
        part = mx.fast.rope(
            part, self.dims, traditional=self.traditional, base=self.base, scale=scale, offset=start, freqs=freqs
        )
        if not gain_first and gain != 1.0:
            part = part * gain
        if self.offset == 0 and end == x.shape[-1]:
            return part
        return mx.concatenate([x[..., : self.offset], part, x[..., end:]], axis=-1)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; infinite freqs (dims left alone) become None."""
        out = dataclasses.asdict(self)
        if self.freqs is not None:
            out["freqs"] = [None if np.isinf(f) else f for f in self.freqs]
        return out

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rope:
        fields = dict(data)
        if fields.get("freqs") is not None:
            fields["freqs"] = tuple(float("inf") if f is None else float(f) for f in fields["freqs"])
        return cls(**fields)


@dataclass(frozen=True)
class Slot:
    """One cached tensor of a layer, `[B, heads, T, dim]`, and how it is rotated (None: not at all)."""

    name: str
    heads: int
    dim: int
    rope: Rope | None = None

    def __post_init__(self) -> None:
        if not (is_int(self.heads) and is_int(self.dim)) or self.heads == 0:
            raise FormatError(f"slot {self.name!r} needs heads >= 1 and dim >= 0, got {self.heads} and {self.dim}")
        if self.rope is not None and self.rope.offset + self.rope.dims > self.dim:
            raise FormatError(f"slot {self.name!r} rotates past its {self.dim} dims: {self.rope}")


@dataclass(frozen=True)
class Stream:
    """All caching layers' keys (or values) together: what one PCA basis covers. Width p = layers * heads * dim."""

    name: str
    heads: int
    dim: int
    ropes: tuple[Rope | None, ...]

    @property
    def layers(self) -> int:
        return len(self.ropes)

    @property
    def width(self) -> int:
        return self.layers * self.heads * self.dim


@dataclass(frozen=True)
class CacheSpec:
    """What a model caches: two slots for each attention layer, None for layers with other state.

    mode: "dual_stream" codes the two slots apart (keys and values); "single_stream" joins them along the last
    axis into the k stream (MLA: latent | k_pe), and the v stream has width 0.
    """

    model_type: str
    layers: tuple[tuple[Slot, Slot] | None, ...]
    mode: str = "dual_stream"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FormatError(f"unknown cache mode {self.mode!r}; known: {', '.join(MODES)}")
        shapes = {tuple((slot.heads, slot.dim) for slot in slots) for slots in self.layers if slots is not None}
        if not shapes:
            raise UnsupportedError(f"no layer of this {self.model_type} model keeps a key/value cache")
        if len(shapes) > 1:
            raise UnsupportedError(f"{self.model_type} caches differently shaped layers: {sorted(shapes)}")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep keys and values."""
        return tuple(i for i, slots in enumerate(self.layers) if slots is not None)

    def stream(self, name: str) -> Stream:
        """The k or v stream across all attention layers."""
        pairs = [slots for slots in self.layers if slots is not None]
        first, second = pairs[0]
        if self.mode == "dual_stream":
            index = STREAMS.index(name)
            slot = pairs[0][index]
            return Stream(name, slot.heads, slot.dim, tuple(pair[index].rope for pair in pairs))
        if name == "v":
            return Stream(name, first.heads, 0, (None,) * len(pairs))
        return Stream(name, first.heads, first.dim + second.dim, tuple(_concat_rope(*pair) for pair in pairs))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; equal layers are written once."""
        kinds = list(dict.fromkeys(slots for slots in self.layers if slots is not None))
        return {
            "model_type": self.model_type,
            "mode": self.mode,
            "kinds": [[_slot_json(slot) for slot in slots] for slots in kinds],
            "layers": [None if slots is None else kinds.index(slots) for slots in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheSpec:
        """The inverse of `to_json`. Raises FormatError when the data is not such a description."""
        try:
            kinds = [tuple(_slot_from_json(slot) for slot in kind) for kind in data["kinds"]]
            if not all(i is None or is_int(i) for i in data["layers"]):
                raise FormatError("every layer is null or the number of a kind")
            layers = tuple(None if i is None else kinds[i] for i in data["layers"])
            if any(layer is not None and len(layer) != 2 for layer in layers):
                raise FormatError("every attention layer needs exactly two slots")
            return cls(str(data["model_type"]), layers, str(data["mode"]))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise FormatError(f"not a cache description: {error!r}") from None


def _concat_rope(first: Slot, second: Slot) -> Rope | None:
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
    return Slot(str(data["name"]), data["heads"], data["dim"], rope)


def _is_positive_float32(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= np.finfo(np.float32).max


def check_rope(spec: CacheSpec, stated: Rope | Mapping[str, Any]) -> None:
    """Compare a preset's rope facts (any of Rope's fields) with the model's. Raises MismatchError on a difference."""
    facts = stated.to_json() if isinstance(stated, Rope) else stated
    for rope in set(spec.stream("k").ropes):
        found = {} if rope is None else rope.to_json()
        wrong = {key: value for key, value in facts.items() if found.get(key) != value}
        if wrong:
            shown = {key: found.get(key) for key in wrong}
            raise MismatchError(
                f"the rotation differs: expected {wrong}, the cache has {shown if rope else 'no rope at all'}"
            )


def fingerprint(model: Any) -> str:
    """A short name for these weights: every parameter's name, shape and first 64 values, hashed.

    Equal for float16 or bfloat16 weights and the same weights widened to float32.
    """
    digest = blake2b(digest_size=8)
    parameters = cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))
    for name, value in sorted(parameters.items()):
        head = value.reshape(-1)[:64]
        if mx.issubdtype(head.dtype, mx.floating):
            head = head.astype(mx.float32)
        digest.update(f"{name} {value.shape} ".encode() + np.array(head).tobytes())
    return digest.hexdigest()

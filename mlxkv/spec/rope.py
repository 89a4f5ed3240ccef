"""Rotary position embedding, as a description and as arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.errors import FormatError
from mlxkv.spec.bounds import MAX_DIM, is_int

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

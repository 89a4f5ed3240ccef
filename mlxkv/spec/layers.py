"""Layers of a cache: slots, windows, and the groups that are coded together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mlxkv.errors import FormatError, UnsupportedError
from mlxkv.spec.bounds import MAX_DIM, MAX_HEADS, MAX_WINDOW, is_int
from mlxkv.spec.rope import Rope

STREAMS = ("k", "v")
USES = ("seam", "fetch")


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
class Layer:
    """One entry of a prompt cache that keeps keys and values.

    Parameters
    ----------
    keys, values
        Its two slots. With multi-head latent attention (MLA) these are the latent and k_pe, the rotated part of the keys.
    latent
        Whether it is of MLA: the two slots are coded as one, side by side.
    window
        Number of newest tokens that it keeps (sliding-window attention); None where it keeps all.
    use
        How the model uses what the cache returns, which live caches have to know and files do not. "seam": one call of
        mlx-lm's attention function gets it. "fetch": anything else.
    selects
        Whether the model chooses tokens of it by their index, so that none may be missing.

    Raises
    ------
    FormatError
        When the parts are out of range.

    Examples
    --------
    >>> Layer(Slot("keys", 1, 256), Slot("values", 1, 256), window=512).rows(tokens=2000)
    512
    """

    keys: Slot
    values: Slot
    latent: bool = False
    window: int | None = None
    use: str = field(default="seam", compare=False)
    selects: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if type(self.latent) is not bool or not (self.window is None or is_int(self.window, 1, MAX_WINDOW)):
            raise FormatError(f"a layer cannot be latent {self.latent!r} with a window of {self.window!r}")
        if self.use not in USES:
            raise FormatError(f"unknown use of a layer {self.use!r}; known: {', '.join(USES)}")
        if self.latent and not self.keys.heads == self.values.heads == 1:
            raise FormatError(f"latents have one head, not {self.keys.heads} and {self.values.heads}")

    def __iter__(self) -> Iterator[Slot]:
        """Iterate over the two slots."""
        return iter((self.keys, self.values))

    def __getitem__(self, index: int) -> Slot:
        return (self.keys, self.values)[index]

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that layers which are coded together have in common."""
        return self.latent, self.window, *((slot.heads, slot.dim) for slot in self)

    def rows(self, tokens: int) -> int:
        """Return how many tokens it keeps.

        Parameters
        ----------
        tokens
            Number of tokens seen.

        Returns
        -------
        int
            All of them, or as many as its window holds.
        """
        return tokens if self.window is None else min(tokens, self.window)


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
class Group:
    """Layers of one shape, which are coded together: the rows of a token hold all of them.

    Parameters
    ----------
    indices
        Indices of the layers in `CacheSpec.layers`.
    members
        The layers.
    """

    indices: tuple[int, ...]
    members: tuple[Layer, ...]

    @property
    def window(self) -> int | None:
        """Number of newest tokens that its layers keep; None where they keep all."""
        return self.members[0].window

    @property
    def latent(self) -> bool:
        """Whether its layers are of MLA: the two slots are one stream."""
        return self.members[0].latent

    def stream(self, name: str) -> Stream:
        """Return one of its streams.

        Parameters
        ----------
        name
            "k" or "v".

        Returns
        -------
        Stream
            Keys or values of all its layers; for MLA "k" is latent and k_pe side by side, and "v" has width 0.
        """
        return self._streams[name]

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        """Both streams by name."""
        first, second = self.members[0]
        if not self.latent:
            return {
                name: Stream(name, slot.heads, slot.dim, tuple(layer[i].rope for layer in self.members))
                for i, (name, slot) in enumerate(zip(STREAMS, (first, second)))
            }
        joined = {id(layer): _concat_rope(*layer) for layer in self.members}  # layers of one kind are one object
        ropes = tuple(joined[id(layer)] for layer in self.members)
        return {
            "k": Stream("k", first.heads, first.dim + second.dim, ropes),
            "v": Stream("v", first.heads, 0, (None,) * len(self.members)),
        }

    def rows(self, tokens: int) -> int:
        """Return how many tokens its layers keep.

        Parameters
        ----------
        tokens
            Number of tokens seen.

        Returns
        -------
        int
            All of them, or as many as the window holds.
        """
        return self.members[0].rows(tokens)


def _concat_rope(first: Slot, second: Slot) -> Rope | None:
    """Return the rotation of two slots joined along the last axis."""
    if first.rope is not None and second.rope is not None:
        raise UnsupportedError("a single stream can rotate only one of its two slots")
    if second.rope is not None:
        return dataclasses.replace(second.rope, offset=second.rope.offset + first.dim)
    return first.rope

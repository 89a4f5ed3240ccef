"""Names of stored texts: each place in a text is named by all tokens before it, so that equal beginnings share blocks.

A text is cut into slots of 512 tokens. The name of a place hashes the name of the slot that it ends in and the tokens of that
slot up to there; the first slot is named by the model, its cache and the grade. Nothing here touches a disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from mlxkv.errors import InputError
from mlxkv.spec import is_int

SLOT = 512  # tokens; no block reaches over a multiple of it
NAME_BYTES = 16
MOST_TOKENS = 2**31 - 1
FORMAT = 1  # changes with the meaning of names or blocks: what was stored before is not found then
_LONGEST_TEXT = 200


class Block(NamedTuple):
    """A file of one stretch of a text: keys and values of all layers for its tokens.

    Parameters
    ----------
    name
        Name of the place that it reaches to; 16 bytes.
    parent
        Name of the place that it begins at.
    slot
        Name of the beginning of its slot.
    start, stop
        Its tokens: from `start` to before `stop`, at most 512 and in one slot.
    rows_from
        First token from which the rows of layers with a window are complete on the way from here back.
    size
        Bytes of the file.
    coding
        How it is coded, such as "kvtc-rd 38".
    artifacts
        Fingerprint of the artifacts that it is decoded with; empty where it needs none.
    model
        Name of the model, for people.
    """

    name: bytes
    parent: bytes
    slot: bytes
    start: int
    stop: int
    rows_from: int
    size: int
    coding: str
    artifacts: str
    model: str

    @property
    def is_sound(self) -> bool:
        """Whether these values can be those of a block, wherever they were read."""
        return (
            all(isinstance(name, bytes) and len(name) == NAME_BYTES for name in self[:3])
            and is_int(self.stop, 1, MOST_TOKENS)
            and is_int(self.start, self.stop - 1 - (self.stop - 1) % SLOT, self.stop - 1)
            and is_int(self.rows_from, 0, self.stop)
            and is_int(self.size, 1, 2**48)
            and (self.start % SLOT != 0 or self.parent == self.slot)
            and all(isinstance(text, str) and len(text) <= _LONGEST_TEXT for text in self[7:])
        )

    @property
    def meta(self) -> dict[str, Any]:
        """The values for a file's own header, under the key "store" of its meta: names are hexadecimal, the size is left out."""
        names = {"name": self.name.hex(), "parent": self.parent.hex(), "slot": self.slot.hex()}
        return {key: value for key, value in {**self._asdict(), **names}.items() if key != "size"}


def block_of(header: dict[str, Any], size: int) -> Block | None:
    """Return the block that a file's header describes.

    Parameters
    ----------
    header
        The header of a container, from any source.
    size
        Bytes of the file.

    Returns
    -------
    Block or None
        None where it describes none.
    """
    meta = header.get("meta")
    values = meta.get("store") if isinstance(meta, dict) else None
    if not isinstance(values, dict) or values.keys() != set(Block._fields) - {"size"}:
        return None
    try:
        names = {key: bytes.fromhex(values[key]) for key in ("name", "parent", "slot")}
    except (TypeError, ValueError):
        return None
    block = Block(**{**values, **names, "size": size})
    return block if block.is_sound else None


def root_name(fingerprint: str, spec_json: str, grade: str) -> bytes:
    """Return the name of the empty text, from which those of all texts follow.

    Parameters
    ----------
    fingerprint
        The model's, which adapters are part of.
    spec_json
        Its cache, as JSON.
    grade
        "exact", or the quality that blocks are coded at as a text: caches of different grades never mix.

    Returns
    -------
    bytes
        16 bytes.
    """
    text = json.dumps([FORMAT, fingerprint, spec_json, grade]).encode()
    return blake2b(text, digest_size=NAME_BYTES, person=b"mlxkv store root").digest()


class Chain:
    """The names along one text.

    Parameters
    ----------
    root
        Name of the empty text: see `root_name`.
    tokens
        The text's tokens, each in int32.

    Raises
    ------
    InputError
        When a token is no int32.

    Examples
    --------
    >>> root = root_name("fingerprint", "{}", "38")
    >>> one, other = Chain(root, [1, 2, 3]), Chain(root, [1, 2, 4])
    >>> one.name(2) == other.name(2), one.name(3) == other.name(3)
    (True, False)
    """

    def __init__(self, root: bytes, tokens: Sequence[int] | np.ndarray) -> None:
        try:
            self._data = memoryview(np.asarray(tokens, dtype="<i4").tobytes())
        except (OverflowError, ValueError, TypeError) as error:
            raise InputError(f"tokens should be whole numbers of 32 bits: {error}") from None
        self._slots = [root]  # names of the multiples of 512 that were asked for so far

    def __len__(self) -> int:
        return len(self._data) // 4

    def name(self, position: int) -> bytes:
        """Return the name of a place.

        Parameters
        ----------
        position
            Tokens before it, from 0 to the text's length.

        Returns
        -------
        bytes
            16 bytes; the root's for 0.

        Raises
        ------
        InputError
            When the text has no such place.
        """
        if not 0 <= position <= len(self):
            raise InputError(f"a text of {len(self)} tokens has no place {position}")
        number, rest = divmod(position, SLOT)
        while len(self._slots) <= number:
            self._slots.append(self._hash(len(self._slots) - 1, SLOT))
        return self._hash(number, rest) if rest else self._slots[number]

    def slot(self, position: int) -> bytes:
        """Return the name of the slot that a block up to a place is in: that of the multiple of 512 before it.

        Parameters
        ----------
        position
            Tokens before the place, from 1 to the text's length.

        Returns
        -------
        bytes
            16 bytes.
        """
        return self.name((position - 1) // SLOT * SLOT)

    def _hash(self, number: int, tokens: int) -> bytes:
        """Return the name of the place so many tokens into a slot."""
        begin = 4 * SLOT * number
        hasher = blake2b(self._slots[number], digest_size=NAME_BYTES)
        hasher.update(self._data[begin : begin + 4 * tokens])
        return hasher.digest()

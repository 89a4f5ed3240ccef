"""A snapshot written to the store: which blocks it is cut into, and which of them are there already."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlxkv.codec.parts import CachePart
from mlxkv.store.chain import SLOT, Block, Chain
from mlxkv.store.codings import AGAIN_TOKENS, SINKS, Coding, Codings
from mlxkv.store.form import LAST_CUT, LEAST_TOKENS, CacheForm
from mlxkv.store.index import BlockStore
from mlxkv.store.snapshot import Snapshot
from mlxkv.store.states import encode_states


@dataclass
class Written:
    """What an insertion wrote.

    Parameters
    ----------
    tokens, blocks, bytes
        Tokens, number and bytes of new blocks; bytes also of states.
    seconds
        Seconds of coding and writing.
    refused
        Blocks for which the store has no room.
    """

    tokens: int = 0
    blocks: int = 0
    bytes: int = 0
    seconds: float = 0.0
    refused: int = 0


class Step(NamedTuple):
    """A block to write.

    Parameters
    ----------
    start, stop
        Its tokens.
    rows_from
        As `mlxkv.store.chain.Block.rows_from`.
    """

    start: int
    stop: int
    rows_from: int


@dataclass
class Insertion:
    """Work of storing a snapshot.

    Parameters
    ----------
    blocks
        The store.
    form
        Form of the model's cache.
    codings
        Codings of its blocks.
    chain
        Names along the text.
    snapshot
        The cache.
    model
        Name of the model.
    """

    blocks: BlockStore
    form: CacheForm
    codings: Codings
    chain: Chain
    snapshot: Snapshot
    model: str
    written: Written = field(default_factory=Written)

    def enter(self, end: int, kind: str, pause: Callable[[], None]) -> bool:
        """Store the text up to a place, and enter that as one from which a conversation can go on.

        Parameters
        ----------
        end
            The place. Where caches can be cut anywhere, one a little before it may be entered.
        kind
            Of whom the text ends with: "system", "user" or "assistant".
        pause
            Called before each block: may wait, or raise.

        Returns
        -------
        bool
            False where the text is too short, cannot go on there, or the store has no room for it.
        """
        place = self._place(end)
        if place < LEAST_TOKENS or not self._goes_on(place):
            return False
        coding = self.codings.current
        with self.blocks.growing(kind) as growth:
            for step in self._steps(place):
                pause()
                began = time.perf_counter()
                block, data = self._encode(step, coding, place)
                if not growth.put(block, data):
                    self.written.refused += 1
                    return False
                self.written.tokens += step.stop - step.start
                self.written.blocks += 1
                self.written.bytes += len(data)
                self.written.seconds += time.perf_counter() - began
            name = self.chain.name(place)
            if self.form.states and not self._has_states(place):
                data = encode_states(self.snapshot.states(), self.snapshot.state_types, {"store": {"name": name.hex()}})
                if not growth.state(name, data):
                    self.written.refused += 1
                    return False
                self.written.bytes += len(data)
            growth.end_at(name)
        return True

    def _place(self, end: int) -> int:
        """Return where a text is entered that ends at a place: 0 for nowhere."""
        if not self.form.cut_anywhere or end % SLOT == 0:
            return end
        begin = end // SLOT * SLOT
        cut = min(end, begin + LAST_CUT)
        path = self.blocks.longest(self.chain, cut)
        before = max(begin, path[-1].stop if path else 0)
        return cut if cut - before >= LEAST_TOKENS else before

    def _goes_on(self, place: int) -> bool:
        """Return whether the snapshot has all that it takes to go on from a place."""
        if place == self.snapshot.length:
            return True
        window = self.form.window
        return not self.form.states and (not window or self.snapshot.rows_from <= max(0, place - window))

    def _has_states(self, place: int) -> bool:
        path = self.blocks.longest(self.chain, place, needs_state=True)
        return bool(path) and path[-1].stop == place

    def _steps(self, place: int) -> Iterator[Step]:
        """Yield the blocks to write up to a place: new ones, and those whose rows of windows are less complete than here."""
        at = rows_from = 0
        for block in self.blocks.longest(self.chain, place):
            if self.codings.artifacts(block.artifacts) is None:  # now that there is something to take its place
                self.blocks.quarantine(block.name, "its artifacts are gone", seen=block)
                break
            better = self._rows_from(block.start, block.stop, rows_from)
            if better < block.rows_from:
                yield Step(block.start, block.stop, better)
            at, rows_from = block.stop, min(better, block.rows_from)
        while at < place:
            stop = min(place, (at // SLOT + 1) * SLOT)
            rows_from = self._rows_from(at, stop, rows_from)
            yield Step(at, stop, rows_from)
            at = stop

    def _rows_from(self, start: int, stop: int, before: int) -> int:
        """Return from where on rows of windows are complete up to the end of a block."""
        first = self.snapshot.rows_from
        return before if first <= start else min(first, stop)

    def _encode(self, step: Step, coding: Coding, place: int) -> tuple[Block, bytes]:
        """Return a block and its file."""
        name, parent, slot = self.chain.name(step.stop), self.chain.name(step.start), self.chain.slot(step.stop)
        artifacts = coding.artifacts
        block = Block(
            name, parent, slot, step.start, step.stop, step.rows_from, 1, coding.name, artifacts.fingerprint, self.model
        )
        ends = step.stop == place == self.snapshot.length
        meta = {"store": block.meta}
        if ends and self.snapshot.rings:
            meta["rings"] = {str(number): at for number, at in self.snapshot.rings.items()}
        # What can neither be cut nor computed again is coded finer.
        again = self.form.window and step.rows_from > max(0, step.stop - AGAIN_TOKENS - self.form.window)
        codec = coding.fine if ends and (self.form.states or again) else coding.plain
        part = self.snapshot.part(step.start, step.stop)
        data = codec.encode(part if coding.quality is None or step.start else _with_short_sinks(part), meta)
        return block._replace(size=len(data)), data


def _with_short_sinks(part: CachePart) -> CachePart:
    """Return the part that begins a text with its first tokens in 16 bits, where those hold them: they are not quantized."""
    streams: dict[str, list[np.ndarray]] = {}
    for key, layers in part.streams.items():
        with np.errstate(over="ignore"):
            halves = [rows[:, :, :SINKS].astype(np.float16).astype(rows.dtype) for rows in layers]
        if not all(np.isfinite(each).all() for each in halves):
            return part
        streams[key] = [np.concatenate([half, x[:, :, SINKS:]], axis=2) for half, x in zip(halves, layers)]
    return part._replace(streams=streams)

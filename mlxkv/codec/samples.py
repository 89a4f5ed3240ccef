"""What a method is calibrated on: token rows out of the dumps of one model, read again for each stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxkv.codec.layout import BLOCK
from mlxkv.codec.stages.rows import to_rows
from mlxkv.dump import KVDump, read_dump
from mlxkv.errors import InputError, MismatchError
from mlxkv.spec import STREAMS, CacheSpec

Progress = Callable[[str], None]


class Origin(NamedTuple):
    """What a dump was made by, without its arrays."""

    model: str
    fingerprint: str
    spec: CacheSpec


class Samples:
    """Rows of several dumps. sinks: first tokens of each file to leave out. per_file: at most so many tokens of a file,
    spread evenly. progress is told each step as it starts.

    Raises InputError for no files, and where there is too little or NaN in them, MismatchError for different models.
    """

    def __init__(
        self, files: Sequence[str | Path], sinks: int, per_file: int | None = None,
        progress: Progress = lambda step: None,
    ) -> None:  # fmt: skip
        if not files:
            raise InputError("calibration needs at least one dump; make them with mlxkv dump")
        self.files, self.sinks, self.per_file, self.progress = files, sinks, per_file, progress
        self.origin = _origin(read_dump(files[0]))
        self.spec, self.tokens = self.origin.spec, 0

    def rows(self, name: str) -> np.ndarray:
        """Un-rotated rows `[tokens, p]` float32 of one stream of all files; their number is then in `tokens`."""
        rows = np.concatenate([self._of_file(path, name) for path in self.files])
        self.tokens = len(rows)
        if self.tokens < 2:
            raise InputError(
                f"{self.tokens} tokens are left after the first {self.sinks} of each file: dump longer texts"
            )
        if not np.isfinite(rows).all():
            raise InputError(f"the dumps hold NaN or infinite values in {name}")
        return rows

    def _of_file(self, path: str | Path, name: str) -> np.ndarray:
        """Made block by block so that only the chosen ones stay."""
        self.progress(f"reading {name} of {Path(path).name}")
        dump = self.read(path)
        stream, batch = dump.spec.stream(name), dump.tokens.shape[0]
        count = batch * max(0, dump.length - self.sinks)
        limit = min(count, self.per_file or count)
        chosen = np.zeros(count, dtype=bool)
        chosen[np.linspace(0, count - 1, limit).astype(int)] = True
        chosen = chosen.reshape(batch, -1)
        kept = [np.zeros((0, stream.width), np.float32)]
        for start in range(self.sinks, dump.length, BLOCK):
            stop = min(start + BLOCK, dump.length)
            rows = np.array(to_rows(stream, list(dump.stream(name)), start, stop))
            kept.append(rows[chosen[:, start - self.sinks : stop - self.sinks].reshape(-1)])
        return np.concatenate(kept)

    def measured(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
        """The dumps' mean sensitivity, `[layers * H, D, D]` for each stream; of each token that counted its energy, `[N,
        layers * H]`, and its un-rotated keys `[N, p]`. Dumps without one are left out; raises InputError when all are."""
        sums: dict[str, np.ndarray] = {}
        energies: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
        keys, stream = [], self.spec.stream("k")
        for path in self.files:
            self.progress(f"reading the sensitivity of {Path(path).name}")
            dump = self.read(path)
            if not dump.sensitivity:
                continue
            of_tokens = {name: dump.sensitivity[f"{name}.energy"] for name in STREAMS}
            counted = np.flatnonzero(sum(energy.sum(axis=(0, 1)) for energy in of_tokens.values()))
            for name in STREAMS:
                heads, dim = np.prod(dump.sensitivity[name].shape[:2]), dump.sensitivity[name].shape[3]
                total = dump.sensitivity[name].reshape(heads, dim, dim) * len(counted)
                sums[name] = sums.get(name, 0) + total
                energies[name].append(of_tokens[name].reshape(heads, -1)[:, counted].T)
            rows = np.array(to_rows(stream, list(dump.k[:, :1]), 0, dump.length))
            keys.append(rows[counted])
        if not keys:
            raise InputError("none of these dumps has a sensitivity: make one at least with mlxkv dump --sensitivity")
        together = np.concatenate(keys)
        if len(together) < 2:
            raise InputError("the dumps' sensitivity is zero everywhere: the model does not read this cache")
        means = {name: total / len(together) for name, total in sums.items()}
        return means, {name: np.concatenate(parts) for name, parts in energies.items()}, together

    def read(self, path: str | Path) -> KVDump:
        """One dump. Raises MismatchError when it is of another model than the first."""
        dump, first = read_dump(path), self.origin
        origin = _origin(dump)
        if (origin.spec, origin.fingerprint) != (first.spec, first.fingerprint):
            raise MismatchError(
                f"{path} was dumped from {origin.model} ({origin.fingerprint}),"
                f" the first file from {first.model} ({first.fingerprint})"
            )
        if dump.start:
            raise InputError(f"{path} starts at token {dump.start}: calibrate on whole dumps")
        return dump


def _origin(dump: KVDump) -> Origin:
    return Origin(dump.model, dump.fingerprint, dump.spec)

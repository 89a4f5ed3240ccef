"""Training data of a codec method: token rows from dumps of one model. Dumps are read again for each stream."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from mlxkv.codec.layout import BLOCK_ROWS
from mlxkv.codec.stages.rows import to_rows
from mlxkv.dump import KVDump, read_dump, stream_key
from mlxkv.errors import InputError, MismatchError
from mlxkv.identity import same_model
from mlxkv.spec import STREAMS, CacheSpec, Stream

Progress = Callable[[str], None]
# Of a file's tokens, held out from training: one in 16, of all files together about 512.
_HELD_OUT_DIVISOR, _MAX_HELD_OUT = 16, 512


class Origin(NamedTuple):
    """Origin of a dump.

    Parameters
    ----------
    model
        Name that the model was loaded by.
    fingerprint
        `mlxkv.identity.fingerprint` of its weights.
    spec
        Description of its cache.
    """

    model: str
    fingerprint: str
    spec: CacheSpec


class Sensitivity(NamedTuple):
    """Mean sensitivity of several dumps for a group of layers, and the contribution of each token.

    Parameters
    ----------
    fisher
        Fisher information `[layers * H, D, D]` of each stream.
    energies
        Squared norm of each counted token's gradient, `[N, layers * H]`, of each stream.
    keys
        Un-rotated keys `[n, p]` of those of the same tokens that the dumps hold: all, but for layers with a window.
    held
        Which tokens those are, `[N]` bool.
    """

    fisher: dict[str, np.ndarray]
    energies: dict[str, np.ndarray]
    keys: np.ndarray
    held: np.ndarray


class Samples:
    """Training data: token rows and sensitivity of several dumps of one model, for one group of its layers.

    Dumps are read one at a time, and again for each stream, so that memory holds one dump and the rows of one stream.

    Parameters
    ----------
    files
        Dumps of one model; at least one.
    sinks
        First tokens of each dump excluded from training.
    per_file
        Most tokens to use per dump, evenly spaced; None for all.
    progress
        Called with the name of each step as it starts.

    Attributes
    ----------
    spec
        Description of the model's cache.
    origin
        Model of the first dump.
    group
        Number of the group of layers; 0 is the main one.
    units
        Numbers by name that training of the main group finds and that of the others uses, so that errors of all layers are
        weighed alike.
    tokens
        Number of tokens that `rows` read last, those held out included; 0 before its first call.
    held_out, trained
        Rows `[n, p]` by stream that `rows` left out, and as many of those that it returned; to measure with.
    facts
        Facts that training finds, for meta.json.

    Raises
    ------
    InputError
        When there are no files.
    """

    def __init__(
        self, files: Sequence[str | Path], sinks: int, per_file: int | None = None,
        progress: Progress = lambda step: None,
    ) -> None:  # fmt: skip
        if not files:
            raise InputError("calibration needs at least one dump; make them with mlxkv dump")
        self.files, self.sinks, self.per_file, self.progress = files, sinks, per_file, progress
        self.origin = _origin(read_dump(files[0]))
        self.spec, self.group = self.origin.spec, 0
        self.units: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        """Forget what was read."""
        self.tokens = 0
        self.held_out: dict[str, np.ndarray] = {}
        self.trained: dict[str, np.ndarray] = {}
        self.facts: dict[str, Any] = {}

    def of_group(self, group: int) -> Self:
        """Return the training data of another group of layers, with the same units.

        Parameters
        ----------
        group
            Its number in `spec.groups`.

        Returns
        -------
        Samples
            Data of the same dumps.
        """
        other = copy.copy(self)
        other.group = group
        other._clear()
        return other

    def stream(self, name: str) -> Stream:
        """Return the description of one stream of the group.

        Parameters
        ----------
        name
            "k" or "v".

        Returns
        -------
        Stream
            The stream.
        """
        return self.spec.groups[self.group].stream(name)

    @property
    def share(self) -> float:
        """The group's part of the width of all groups' rows."""
        widths = [sum(group.stream(name).width for name in STREAMS) for group in self.spec.groups]
        return widths[self.group] / max(1, sum(widths))

    def rows(self, name: str) -> np.ndarray:
        """Return the rows of one stream from all dumps, with the rotation undone, but for those that are held out.

        The last sixteenth of each file is held out, of many files less, so that it is at most about 512 tokens in all.

        Parameters
        ----------
        name
            "k" or "v".

        Returns
        -------
        np.ndarray
            Rows `[N, p]` float32.

        Raises
        ------
        InputError
            When there are fewer than two, or some are not finite.
        MismatchError
            For dumps of different models.
        """
        parts = [self._rows_of_file(path, name) for path in self.files]
        self.tokens = sum(len(rows) for rows in parts)
        if self.tokens < 2:
            raise InputError(
                f"{self.tokens} tokens are left after the first {self.sinks} of each file: dump longer texts"
            )
        if not all(np.isfinite(rows).all() for rows in parts):
            raise InputError(f"the dumps hold NaN or infinite values in {stream_key(self.group, name)}")
        most = max(1, _MAX_HELD_OUT // len(parts))
        ends = [len(rows) - min(most, len(rows) // _HELD_OUT_DIVISOR) for rows in parts]
        self.held_out[name] = np.concatenate([rows[end:] for rows, end in zip(parts, ends)])
        self.trained[name] = np.concatenate([rows[2 * end - len(rows) : end] for rows, end in zip(parts, ends)])
        return np.concatenate([rows[:end] for rows, end in zip(parts, ends)])

    def _rows_of_file(self, path: str | Path, name: str) -> np.ndarray:
        """Return the evenly spaced rows of one file, made block by block so that no others stay in memory."""
        self.progress(f"reading {stream_key(self.group, name)} of {Path(path).name}")
        dump = self.read(path)
        stream, array, first = self.stream(name), dump.stream(name, self.group), self._first(dump)
        batch, stop = array.shape[1], array.shape[3]
        begin = min(max(0, self.sinks - first), stop)
        count = batch * (stop - begin)
        limit = min(count, self.per_file or count)
        chosen = np.zeros(count, dtype=bool)
        chosen[np.linspace(0, count - 1, limit).astype(int)] = True
        chosen = chosen.reshape(batch, -1)
        kept = [np.zeros((0, stream.width), np.float32)]
        for start in range(begin, stop, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, stop)
            rows = np.array(to_rows(stream, list(array), start, end, first))
            kept.append(rows[chosen[:, start - begin : end - begin].reshape(-1)])
        return np.concatenate(kept)

    def _first(self, dump: KVDump) -> int:
        """Return the position of the first token that the group's layers hold."""
        return dump.length - self.spec.groups[self.group].rows(dump.length)

    def sensitivity(self) -> Sensitivity:
        """Return the mean sensitivity of the dumps that have one.

        Returns
        -------
        Sensitivity
            Means over all counted tokens.

        Raises
        ------
        InputError
            When no dump has one, or it is zero everywhere.
        MismatchError
            For dumps of different models.
        """
        sums: dict[str, np.ndarray] = {}
        energies: dict[str, list[np.ndarray]] = {name: [] for name in STREAMS}
        keys, held, stream = [], [], self.stream("k")
        for path in self.files:
            self.progress(f"reading the sensitivity of {Path(path).name}")
            dump = self.read(path)
            if not dump.sensitivity:
                continue
            parts = {name: stream_key(self.group, name) for name in STREAMS}
            energy_of = {name: dump.sensitivity[f"{part}.energy"] for name, part in parts.items()}
            counted = np.flatnonzero(sum(energy.sum(axis=(0, 1)) for energy in energy_of.values()))
            for name, part in parts.items():
                heads, dim = np.prod(dump.sensitivity[part].shape[:2]), dump.sensitivity[part].shape[3]
                total = dump.sensitivity[part].reshape(heads, dim, dim) * len(counted)
                sums[name] = sums.get(name, 0) + total
                energies[name].append(energy_of[name].reshape(heads, -1)[:, counted].T)
            first = self._first(dump)
            held.append(counted >= first)
            array = dump.stream("k", self.group)[:, :1]
            rows = np.array(to_rows(stream, list(array), 0, array.shape[3], first))
            keys.append(rows[counted[held[-1]] - first])
        if not keys:
            raise InputError("none of these dumps has a sensitivity: make one at least with mlxkv dump --sensitivity")
        known = np.concatenate(held)
        if len(known) < 2 and not self.group:
            raise InputError("the dumps' sensitivity is zero everywhere: the model does not read this cache")
        means = {name: total / max(1, len(known)) for name, total in sums.items()}
        joined = {name: np.concatenate(parts) for name, parts in energies.items()}
        return Sensitivity(means, joined, np.concatenate(keys), known)

    def read(self, path: str | Path) -> KVDump:
        """Read one dump.

        Parameters
        ----------
        path
            Its file.

        Returns
        -------
        KVDump
            The dump.

        Raises
        ------
        InputError
            When it is only a part of a cache.
        MismatchError
            When it is of another model than the first.
        """
        dump, first = read_dump(path), self.origin
        origin = _origin(dump)
        if origin.spec != first.spec or not same_model(origin.fingerprint, first.fingerprint):
            raise MismatchError(
                f"{path} was dumped from {origin.model} ({origin.fingerprint}),"
                f" the first file from {first.model} ({first.fingerprint})"
            )
        if dump.start:
            raise InputError(f"{path} starts at token {dump.start}: calibrate on complete dumps")
        if len(dump.held_groups) < len(dump.spec.groups):
            raise InputError(f"{path} is a part of a cache, without its windows: calibrate on complete dumps")
        return dump


def _origin(dump: KVDump) -> Origin:
    """Return the origin of a dump."""
    return Origin(dump.model, dump.fingerprint, dump.spec)

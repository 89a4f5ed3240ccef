"""Finished stretches on disk: what an interrupted calibration goes on from. A private folder for each model and texts."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mlxkv.bundled.wheels import cache_home
from mlxkv.calibration.texts import Stretch
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import InputError, MlxkvError
from mlxkv.io.disk import lock
from mlxkv.io.folders import private_folder, remove_folder, sweep_all
from mlxkv.spec import CacheSpec

FORMAT = "1"  # of what is stored, which another version of mlxkv might compute otherwise
_KEPT_SECONDS = 7 * 24 * 3600  # an interrupted calibration waits so long for its continuation
_SLACK = 2**20  # bytes that a file may have beyond its arrays


def work_home() -> Path:
    """Return the folder in which interrupted calibrations wait.

    Returns
    -------
    Path
        In the user's cache folder, or in `$MLXKV_HOME`.
    """
    return cache_home() / "calibrating"


def stretch_bytes(spec: CacheSpec, tokens: int) -> int:
    """Return the bytes of a finished stretch in float16.

    Parameters
    ----------
    spec
        Description of the model's cache.
    tokens
        Number of its tokens.

    Returns
    -------
    int
        Bytes of keys, values and their sensitivity.
    """
    total = 0
    for group in spec.groups:
        for stream in (group.stream(name) for name in ("k", "v")):
            total += 2 * stream.width * group.rows(tokens)
            total += 4 * stream.layers * stream.heads * (stream.dim**2 + tokens)
    return total


@dataclass
class Work:
    """The finished stretches of one calibration.

    Parameters
    ----------
    fingerprint
        Fingerprint of the model.
    spec
        Description of its cache.
    stretches
        All stretches that may be run, in their order.
    name
        Name of its folder; empty for one that depends on the model and the stretches.

    Raises
    ------
    InputError
        When the folder cannot be made, or another process works in it.
    """

    fingerprint: str
    spec: CacheSpec
    stretches: Sequence[Stretch]
    name: str = ""
    folder: Path = field(init=False)
    _opened: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        _forget_old()
        self.folder = work_home() / (self.name or self._digest())
        private_folder(work_home())
        private_folder(self.folder)
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise InputError(f"{self.folder} should be a folder of mlxkv: remove what is there")
        self._opened = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without locks
            if not lock(self._opened, exclusive=True):
                os.close(self._opened)
                raise InputError("mlxkv calibrate is at work on this model already: wait for it, or end it first")
        sweep_all(self.folder)
        os.utime(self.folder)

    def _digest(self) -> str:
        digest = blake2b(f"{FORMAT} {self.fingerprint} ".encode(), digest_size=16)
        for stretch in self.stretches:
            digest.update(np.array([len(stretch.tokens), *stretch.tokens], "<i4").tobytes())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        """Return the file of a stretch.

        Parameters
        ----------
        index
            Its place among the stretches.

        Returns
        -------
        Path
            The file, which need not exist.
        """
        return self.folder / f"{index:05d}.npz"

    def finished(self) -> set[int]:
        """Return which stretches are finished; files that are not what they should be are removed.

        Returns
        -------
        set of int
            Places among the stretches.
        """
        expected = {self.path(index).name: index for index in range(len(self.stretches))}
        done = set()
        for name in sorted(os.listdir(self.folder)):
            if name in expected and self.is_finished(expected[name]):
                done.add(expected[name])
            else:
                remove_path(self.folder / name)
        return done

    def is_finished(self, index: int) -> bool:
        """Return whether a stretch is finished; a file that is not what it should be is removed.

        Parameters
        ----------
        index
            Its place among the stretches.

        Returns
        -------
        bool
            Whether its file is there, whole and of this model and these tokens.
        """
        path = self.path(index)
        right = self._is_right(path, self.stretches[index].tokens)
        if not right:
            remove_path(path)
        return right

    def _is_right(self, path: Path, tokens: Sequence[int]) -> bool:
        """Check a file from any source: of bounded size, whole, of this model and of these tokens."""
        try:
            if path.is_symlink() or path.stat().st_size > 2 * stretch_bytes(self.spec, len(tokens)) + _SLACK:
                return False
            dump = read_dump(path)
        except (MlxkvError, OSError):
            return False
        same = (dump.fingerprint, dump.spec, dump.tokens.tolist()) == (self.fingerprint, self.spec, [list(tokens)])
        return same and bool(dump.sensitivity) and not dump.start

    def keep(self, index: int, dump: KVDump) -> None:
        """Store a finished stretch: whole, or not at all.

        Parameters
        ----------
        index
            Its place among the stretches.
        dump
            Its cache and sensitivity.

        Raises
        ------
        InputError
            When it cannot be written.
        """
        write_dump(self.path(index), dump)

    def close(self) -> None:
        """Let other processes go on from what is there."""
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None

    def remove(self) -> None:
        """Remove the folder, when its artifacts are saved or will never be."""
        self.close()
        with suppress(InputError):  # it is gone
            remove_folder(self.folder)


def _forget_old() -> None:
    """Remove the folders of calibrations that no one has gone on with for a week, and what a kill left of removed ones."""
    home = work_home()
    sweep_all(home)
    with suppress(OSError):
        for name in os.listdir(home):
            if time.time() - os.lstat(home / name).st_mtime > _KEPT_SECONDS:
                remove_path(home / name)


def remove_path(path: Path) -> None:
    """Remove whatever is at a path, if anything is and it can be.

    Parameters
    ----------
    path
        A file, a link, or a folder with all that is in it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()

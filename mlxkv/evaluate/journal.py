"""Finished samples of an evaluation, kept as they come, so that a run that was stopped goes on where it was.

The file has JSON lines: the settings of the run, then one line for each sample. A line that was cut off in the middle
of a write is removed, and its sample is measured again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.disk import is_at, lock, sync, sync_folder
from mlxkv.io.inputs import parse_json

MAX_BYTES = 1 << 30


class Journal:
    """File of the finished samples of one run; a context manager that opens it, for this run alone, and closes it.

    Parameters
    ----------
    path
        The file; it is made where it does not exist, and gone on with where it does.
    facts
        JSON values besides the run's settings that have to be the same for samples to go together, such as the model
        and the version of mlxkv.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = Path(folder.name) / "result.json.partial"
    >>> with Journal(path, {"model": "m"}) as journal:
    ...     print(journal.begin({"seeds": 1}))
    ...     journal.add("sample 1", [{"variant": "whole", "kl": 0.0}])
    {}
    >>> with Journal(path, {"model": "m"}) as journal:
    ...     print(journal.begin({"seeds": 1}))
    ...     journal.finish()
    {'sample 1': [{'variant': 'whole', 'kl': 0.0}]}
    >>> folder.cleanup()
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self._file: BinaryIO | None = None
        self._begun = False

    def __enter__(self) -> Journal:
        """Open the file for this run alone. Raises InputError where that cannot be, or another run has it open."""
        with self._typed():
            self._file = self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file and not self._file.closed:
            with suppress(OSError):
                if not os.fstat(self._file.fileno()).st_size:  # a run that never began leaves nothing
                    os.unlink(self.path)
            self._file.close()

    def begin(self, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Return what is finished already, and from now on add to it.

        Parameters
        ----------
        settings
            JSON values that have to be the same for samples to go together.

        Returns
        -------
        dict of str to list of dict
            Records of finished samples by the samples' names.

        Raises
        ------
        MismatchError
            When the file is of a run with other settings or facts; it is left as it is.
        FormatError
            When the file is damaged.
        InputError
            When it cannot be written.
        """
        header = json.loads(json.dumps({**self.facts, **settings}))
        file = self._opened()
        stored, done, complete = self._read(file)
        different = [key for key in {**stored, **header} if stored.get(key) != header.get(key)]
        if stored and different:
            raise MismatchError(
                f"{self.path} is of another run, with another {' and '.join(different)}; "
                "remove it, or write this run to another file"
            )
        with self._typed():
            os.ftruncate(file.fileno(), complete)
            file.seek(complete)
        self._begun = True
        if not stored:
            self._write(header)
            sync_folder(self.path.parent)
        return done

    def add(self, name: str, records: list[dict[str, Any]]) -> None:
        """Store a finished sample; it is on disk when this returns.

        Parameters
        ----------
        name
            The sample's, different from that of all other samples.
        records
            A record for each variant, as JSON values.

        Raises
        ------
        InputError
            When it cannot be written, or before `begin`.
        """
        self._write({"sample": name, "records": records})

    def finish(self) -> None:
        """Remove the file, once its content is in the result.

        Raises
        ------
        InputError
            When it cannot be removed.
        """
        with self._typed(), suppress(FileNotFoundError):
            os.unlink(self.path)
        self._opened().close()

    def _open(self) -> BinaryIO:
        """Open and lock the file; make it where there is none."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            file = os.fdopen(descriptor, "r+b", buffering=0)
            try:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise InputError(f"cannot write {self.path}: not a regular file")
                with suppress(OSError):  # where there are no locks, it is up to the user
                    if not lock(descriptor, exclusive=True):
                        raise InputError(f"another run is writing {self.path}: wait for it, or write to another file")
                if is_at(descriptor, self.path):
                    return file
            except BaseException:
                file.close()
                raise
            file.close()  # a run that has just finished removed it

    @contextmanager
    def _typed(self) -> Iterator[None]:
        """Turn errors of the operating system into InputError."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _opened(self) -> BinaryIO:
        """Return the open file. Raises InputError outside of `with`."""
        if self._file is None:
            raise InputError(f"{self.path} is not open: use the journal in a with statement")
        return self._file

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line, and wait until it is on disk. Raises InputError before `begin`."""
        file = self._opened()
        if not self._begun:
            raise InputError(f"{self.path}: begin a run first")
        data = memoryview(json.dumps(line).encode() + b"\n")
        with self._typed():
            while data:
                data = data[file.write(data) :]
            sync(file.fileno())

    def _read(self, file: BinaryIO) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], int]:
        """Return the header, the samples, and the number of bytes in complete lines."""
        data = b""
        with self._typed():
            file.seek(0)
            while len(data) <= MAX_BYTES and (piece := file.read(MAX_BYTES + 1 - len(data))):
                data += piece
        if len(data) > MAX_BYTES:
            raise FormatError(f"{self.path} has more than {MAX_BYTES} bytes")
        end = data.rfind(b"\n") + 1
        rows = [
            parse_json(line, f"{self.path}, line {number}") for number, line in enumerate(data[:end].splitlines(), 1)
        ]
        done = {}
        for number, row in enumerate(rows[1:], 2):
            name, records = row.get("sample"), row.get("records")
            if not isinstance(name, str) or not isinstance(records, list) or not all(map(_is_record, records)):
                raise FormatError(f"{self.path}, line {number}: not a finished sample")
            done[name] = records
        return (rows[0] if rows else {}), done, end


def _is_record(value: Any) -> bool:
    """Return whether a value can be a record."""
    return isinstance(value, dict) and isinstance(value.get("variant"), str)

"""Finished samples of an evaluation, kept as they come, so that a run that was stopped goes on where it was.

The file has JSON lines: the settings of the run, then one line for each sample. A line that was cut off in the middle
of a write is removed, and its sample is measured again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.io.inputs import open_input, parse_json

MAX_BYTES = 1 << 30


class Journal:
    """File of the finished samples of one run; a context manager that closes it.

    Parameters
    ----------
    path
        The file; it is made when the run begins, and gone on with where it exists.
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

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def begin(self, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Open the file, and return what is finished already.

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
        """
        header = json.loads(json.dumps({**self.facts, **settings}))
        done: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            stored, done, complete = self._read()
            different = [key for key in {**stored, **header} if stored.get(key) != header.get(key)]
            if stored and different:
                raise MismatchError(
                    f"{self.path} is of another run, with another {' and '.join(different)}; "
                    "remove it, or write this run to another file"
                )
            os.truncate(self.path, complete)
        self._file = open(self.path, "ab")  # noqa: SIM115  # open until __exit__
        if not self._file.tell():
            self._write(header)
        return done

    def add(self, name: str, records: list[dict[str, Any]]) -> None:
        """Store a finished sample; it is on disk when this returns.

        Parameters
        ----------
        name
            The sample's, different from that of all other samples.
        records
            A record for each variant, as JSON values.
        """
        self._write({"sample": name, "records": records})

    def finish(self) -> None:
        """Remove the file, once its content is in the result."""
        self._opened().close()
        self.path.unlink()

    def _opened(self) -> BinaryIO:
        """Return the open file. Raises InputError before `begin`."""
        if self._file is None:
            raise InputError(f"{self.path} is not open: begin a run first")
        return self._file

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line, and wait until it is on disk."""
        file = self._opened()
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())

    def _read(self) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], int]:
        """Return the header, the samples, and the number of bytes in complete lines."""
        with open_input(self.path) as file:
            data = file.read(MAX_BYTES + 1)
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

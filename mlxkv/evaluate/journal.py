"""Finished samples of an evaluation, kept as they come, so that a run that was stopped goes on where it was.

A file of JSON lines beside the result: what is run, then one line a sample. A line that was cut off in the middle of a
write is measured again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from mlxkv.errors import FormatError, MismatchError
from mlxkv.io.inputs import open_input, parse_json

MOST_BYTES = 1 << 30


class Journal:
    """A context manager; `finish` removes the file once its content is in the result.

    facts: what else has to be the same for samples to go together, such as the model and the version of mlxkv.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.file: Any = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file:
            self.file.close()

    def begin(self, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """The records of finished samples by name. Raises MismatchError for a journal of another run, FormatError for a
        damaged one."""
        header = json.loads(json.dumps({**self.facts, **settings}))
        done: dict[str, list[dict[str, Any]]] = {}
        if self.path.exists():
            begun, done, whole = self._read()
            different = [key for key in {**begun, **header} if begun.get(key) != header.get(key)]
            if begun and different:
                raise MismatchError(
                    f"{self.path} is of another run, with another {' and '.join(different)}; "
                    "remove it, or write this run to another file"
                )
            os.truncate(self.path, whole)
        self.file = open(self.path, "ab")  # noqa: SIM115  # open until __exit__
        if not self.file.tell():
            self._write(header)
        return done

    def add(self, name: str, records: list[dict[str, Any]]) -> None:
        """Remember a finished sample; it is on disk when this returns."""
        self._write({"sample": name, "records": records})

    def finish(self) -> None:
        self.file.close()
        self.path.unlink()

    def _write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _read(self) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]], int]:
        """The header, the samples, and how many bytes are whole lines."""
        with open_input(self.path) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise FormatError(f"{self.path} has more than {MOST_BYTES} bytes")
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
    return isinstance(value, dict) and isinstance(value.get("variant"), str)

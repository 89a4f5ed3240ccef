"""The container: magic, version, checksummed sections, and last their checksummed JSON header. See docs/format.md.

The header stands last, so that a file grows by new sections and a new header in place of the old one. The meaning of the
sections is defined in `mlxkv.codec` and `mlxkv.live.serialization`.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

from mlxkv.errors import ChecksumError, FormatError, InputError, VersionError
from mlxkv.io import lossless
from mlxkv.io.inputs import MAX_JSON, parse_json
from mlxkv.io.journal import open_through_journal
from mlxkv.spec import is_int

MAGIC = b"\x89MLXKV\r\n"
END_MAGIC = b"MLXKVend"
VERSION = 2
MAX_HEADER = MAX_JSON
MAX_SIZE = 2**48  # bytes of a section that a reader accepts
Source = bytes | bytearray | memoryview | str | Path
_PREAMBLE = struct.Struct("<8sHH")  # magic, version, reserved
_FOOTER = struct.Struct("<I16s8s")  # header length, BLAKE2b-128, end


@dataclass(frozen=True)
class Section:
    """One entry of the header's table of sections.

    Parameters
    ----------
    name
        Name, unique in the file.
    coding
        One of `lossless.CODINGS`.
    size
        Bytes when decoded.
    stored
        Bytes in the file.
    digest
        BLAKE2b-128 of the stored bytes, hexadecimal.
    """

    name: str
    coding: str
    size: int
    stored: int
    digest: str


def digest(data: bytes) -> bytes:
    """Return the checksum of headers, sections and artifacts.

    Parameters
    ----------
    data
        Any bytes.

    Returns
    -------
    bytes
        BLAKE2b with 128 bits.
    """
    return blake2b(data, digest_size=16).digest()


def encode_section(name: str, data: bytes, coding: str = "deflate") -> tuple[Section, bytes]:
    """Code one section's bytes. Safe to call from threads: zlib and BLAKE2b release the GIL.

    Parameters
    ----------
    name
        Name, unique in the file.
    data
        Its bytes.
    coding
        One of `lossless.CODINGS`; "raw" is used instead where it does not shrink them.

    Returns
    -------
    tuple[Section, bytes]
        The table's entry and the stored bytes.

    Raises
    ------
    InputError
        For a coding that does not exist.
    """
    stored = lossless.encode(coding, data)
    if len(stored) >= len(data):
        coding, stored = "raw", data
    return Section(name, coding, len(data), len(stored), digest(stored).hex()), stored


def write(file: IO[bytes], header: Mapping[str, Any], sections: Iterable[tuple[Section, bytes]]) -> None:
    """Write a container: the sections in order, one at a time, then the header.

    Parameters
    ----------
    file
        File to write to.
    header
        JSON values by key; "sections" is the table's own key.
    sections
        Sections in the file's order, as `encode_section` returned them.

    Examples
    --------
    >>> file = io.BytesIO()
    >>> write(file, {"kind": "note"}, [encode_section("text", b"hello")])
    >>> with Reader(file.getvalue()) as reader:
    ...     reader.header, reader.read("text")
    ({'kind': 'note'}, b'hello')
    """
    file.write(_PREAMBLE.pack(MAGIC, VERSION, 0))
    written = []
    for section, stored in sections:
        file.write(stored)
        written.append(section)
    file.write(encode_tail(header, written, []))


def encode_tail(header: Mapping[str, Any], kept: Sequence[Section], sections: Iterable[tuple[Section, bytes]]) -> bytes:
    """Return the bytes after the sections that a growing container keeps.

    Parameters
    ----------
    header
        JSON values by key.
    kept
        Entries of the sections that stay where they are.
    sections
        Sections that follow them, as `encode_section` returned them.

    Returns
    -------
    bytes
        The new sections, the header with the table of all, and the footer.

    Raises
    ------
    InputError
        When the header is longer than a reader accepts.
    """
    sections = list(sections)
    table = [[s.name, s.coding, s.size, s.stored, s.digest] for s in (*kept, *(section for section, _ in sections))]
    text = json.dumps({**header, "sections": table}, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise InputError(
            f"the header would have {len(text)} bytes, and readers accept {MAX_HEADER}: store less in meta"
        )
    start = struct.pack("<HI", VERSION, len(text))
    footer = _FOOTER.pack(len(text), digest(start + text), END_MAGIC)
    return b"".join([*(stored for _, stored in sections), text, footer])


class Reader:
    """A container open for reading. Sections are read, checked and decoded one by one, on request.

    Memory stays bounded by the header's length and the largest section asked for.

    Parameters
    ----------
    source
        A container's bytes, the path of its file, or the open file. By its path a file is read as its last append left it,
        even if that was interrupted, and others do not change it as long as it is open here.

    Attributes
    ----------
    name
        Name of the source, for messages.
    size
        Bytes of the whole container.
    header
        The header's own fields.
    sections
        Entries of all sections by name, in the file's order.

    Raises
    ------
    InputError
        When the file cannot be opened.
    FormatError
        When it is no intact container.
    ChecksumError
        When its bytes have changed.
    VersionError
        When it has another format version.
    """

    def __init__(self, source: Source | IO[bytes]) -> None:
        self._file: IO[bytes]
        self.name = str(source) if isinstance(source, str | Path) else "the blob"
        if isinstance(source, str | Path):
            self._file = open_through_journal(source, is_intact)
        else:
            self._file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        try:
            self.size = self._file.seek(0, io.SEEK_END)
            self._file.seek(0)
            self.header = self._read_header()
            self.sections = {section.name: section for section in self._table()}
        except BaseException:
            if self._file is not source:
                self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read_header(self) -> dict[str, Any]:
        """Check the length and checksum of the header and return it."""
        preamble = self._file.read(_PREAMBLE.size)
        if len(preamble) < _PREAMBLE.size or preamble[:8] != MAGIC:
            raise FormatError(f"{self.name} is not an mlxkv container: it starts with {preamble[:8]!r}, not {MAGIC!r}")
        _, version, reserved = _PREAMBLE.unpack(preamble)
        if reserved:
            raise FormatError(f"the reserved bytes of {self.name} are {reserved}, not 0: the file is damaged")
        if version != VERSION:
            advice = "upgrade mlxkv" if version > VERSION else "make it again"
            raise VersionError(f"{self.name} has format version {version}; this mlxkv reads {VERSION}: {advice}")
        body = self.size - _PREAMBLE.size - _FOOTER.size
        self._file.seek(max(0, self.size - _FOOTER.size))
        footer = self._file.read(_FOOTER.size)
        if body < 0 or footer[-len(END_MAGIC) :] != END_MAGIC:
            raise FormatError(f"{self.name} is truncated or extended: it does not end with {END_MAGIC!r}")
        length, expected, _ = _FOOTER.unpack(footer)
        if length > min(MAX_HEADER, body):
            raise FormatError(f"{self.name} is truncated: its header claims {length} bytes, the file has {self.size}")
        self._end = self._file.seek(self.size - _FOOTER.size - length)
        text = self._file.read(length)
        if digest(struct.pack("<HI", version, length) + text) != expected:
            raise ChecksumError(f"the header of {self.name} is damaged: its checksum does not match; restore a copy")
        return parse_json(text, f"the header of {self.name}")

    def _table(self) -> list[Section]:
        """Return the entries of all sections, checking that they fill the file."""
        table = self.header.pop("sections", None)
        position = _PREAMBLE.size
        sections: list[Section] = []
        self._starts: dict[str, int] = {}
        if not isinstance(table, list):
            raise FormatError(f"the header of {self.name} has no section table")
        for row in table:
            if not _is_row(row) or row[0] in self._starts:
                raise FormatError(f"the section table of {self.name} is malformed: {str(row)[:80]}")
            section = Section(*row)
            sections.append(section)
            self._starts[section.name] = position
            position += section.stored
        if position != self._end:
            raise FormatError(
                f"{self.name} should have {position} bytes of sections by its header, but has {self._end}: truncated or extended"
            )
        return sections

    def read(self, name: str, size: int | None = None) -> bytes:
        """Return the decoded bytes of one section.

        Parameters
        ----------
        name
            Name of the section.
        size
            Bytes that it must have when decoded; None for any number.

        Returns
        -------
        bytes
            The decoded bytes.

        Raises
        ------
        FormatError
            When there is no such section, or it is of another size or does not decode.
        ChecksumError
            When its bytes have changed.
        """
        section = self._section(name)
        if size is not None and section.size != size:
            raise FormatError(
                f"section {name!r} of {self.name} decodes to {section.size} bytes; its geometry needs {size}"
            )
        self._file.seek(self._starts[name])
        stored = self._file.read(section.stored)
        self._compare(section, digest(stored))
        try:
            return lossless.decode(section.coding, stored, section.size)
        except FormatError as error:
            raise FormatError(f"section {section.name!r} of {self.name} is damaged: {error}") from None

    def end_of(self, first: Sequence[Section]) -> int:
        """Return where the file's first sections end.

        Parameters
        ----------
        first
            Entries of the sections that the file begins with.

        Returns
        -------
        int
            Offset in bytes from the beginning of the file.
        """
        return _PREAMBLE.size + sum(section.stored for section in first)

    def verify(self) -> None:
        """Check every section's checksum, piece by piece and without decoding anything.

        Raises
        ------
        ChecksumError
            When bytes have changed.
        """
        for section in self.sections.values():
            self._file.seek(self._starts[section.name])
            hasher, left = blake2b(digest_size=16), section.stored
            while left:
                piece = self._file.read(min(left, 2**20))
                hasher.update(piece)
                left -= len(piece) or left
            self._compare(section, hasher.digest())

    def _section(self, name: str) -> Section:
        """Return the entry of a section, which must be there."""
        if name not in self.sections:
            raise FormatError(
                f"{self.name} has no section {name[:80]!r}; it has {', '.join(list(self.sections)[:20])[:400]}"
            )
        return self.sections[name]

    def _compare(self, section: Section, found: bytes) -> None:
        """Raise ChecksumError when a digest is not the section's."""
        if found.hex() != section.digest:
            raise ChecksumError(
                f"section {section.name!r} of {self.name} is damaged: its checksum does not match; restore a copy"
            )


def is_intact(file: IO[bytes]) -> bool:
    """Return whether an open file is a container whose bytes are all as they were written.

    Parameters
    ----------
    file
        The file, which stays open.

    Returns
    -------
    bool
        False for a container that is damaged or half written.
    """
    try:
        file.seek(0)
        Reader(file).verify()
    except FormatError:
        return False
    return True


def _is_row(row: Any) -> bool:
    """Return whether a table row is [name, coding, size, stored, digest] with sizes that the coding can reach."""
    if not (isinstance(row, list) and len(row) == 5 and all(isinstance(row[i], str) for i in (0, 1, 4))):
        return False
    size, stored = row[2], row[3]
    if not (is_int(size, 0, MAX_SIZE) and is_int(stored, 0, MAX_SIZE)):
        return False
    return lossless.is_plausible(row[1], size, stored)

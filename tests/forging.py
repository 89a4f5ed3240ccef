"""Containers taken apart, and put together with right checksums whatever is in them, as an attacker would."""

import json
import struct

from mlxkv.io.container import END_MAGIC, MAGIC, VERSION, digest

PREAMBLE, FOOTER = 12, 28


def header_of(blob):
    """The header as JSON, and the sections' bytes."""
    (length,) = struct.unpack_from("<I", blob, len(blob) - FOOTER)
    end = len(blob) - FOOTER - length
    return json.loads(blob[end : end + length]), blob[PREAMBLE:end]


def forge(header, body=b"", version=VERSION, reserved=0, length=None, magic=MAGIC, end=END_MAGIC):
    """The container of a header, JSON or its text, and the sections' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    checksum = digest(struct.pack("<HI", version, length) + text)
    return struct.pack("<8sHH", magic, version, reserved) + body + text + struct.pack("<I16s8s", length, checksum, end)

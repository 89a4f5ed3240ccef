import io
import json
import tracemalloc
import zlib

import numpy as np
import pytest
from forging import FOOTER, PREAMBLE, forge, header_of

from mlxkv.errors import ChecksumError, FormatError, InputError, VersionError
from mlxkv.io.container import MAGIC, MAX_HEADER, VERSION, Reader, Section, digest, encode_section, write

SMOOTH = bytes(5000)
NOISE = np.random.default_rng(0).bytes(500)


def packed(header, sections):
    out = io.BytesIO()
    write(out, header, sections)
    return out.getvalue()


def toy():
    return packed(
        {"method": "toy"}, [encode_section("a", SMOOTH), encode_section("b", NOISE), encode_section("c", b"")]
    )


def with_table(table, rest=b""):
    return forge({"sections": table}, rest)


def row(data, name="a", coding="raw", size=None, stored=None):
    return [
        name,
        coding,
        len(data) if size is None else size,
        len(data) if stored is None else stored,
        digest(data).hex(),
    ]


def test_a_container_gives_back_header_and_sections():
    with Reader(toy()) as reader:
        assert reader.header == {"method": "toy"}
        assert list(reader.sections) == ["a", "b", "c"]
        assert [reader.read(name) for name in "cba"] == [b"", NOISE, SMOOTH]
        assert reader.size == len(toy())


def test_a_container_is_read_from_a_path(tmp_path):
    (tmp_path / "toy.mlxkv").write_bytes(toy())
    for path in (tmp_path / "toy.mlxkv", str(tmp_path / "toy.mlxkv")):
        with Reader(path) as reader:
            assert reader.read("b") == NOISE


def test_the_layout_on_disk_is_the_documented_one():
    blob = packed({"x": 1}, [encode_section("n", NOISE)])
    text = json.dumps({"x": 1, "sections": [row(NOISE, "n")]}, separators=(",", ":")).encode()
    assert blob == forge(text, NOISE)


def test_deflate_is_kept_only_when_it_helps():
    smooth, noise, empty = encode_section("a", SMOOTH)[0], encode_section("b", NOISE)[0], encode_section("c", b"")[0]
    assert (smooth.coding, smooth.size) == ("deflate", 5000)
    assert smooth.stored < 100
    assert (noise.coding, noise.size, noise.stored) == ("raw", 500, 500)
    assert (empty.coding, empty.size, empty.stored) == ("raw", 0, 0)
    assert encode_section("d", SMOOTH, "raw")[0].coding == "raw"


def test_sections_are_checked_only_when_read():
    blob = bytearray(toy())
    blob[PREAMBLE + len(header_of(blob)[1]) - 1] ^= 1  # in section b, the last one that is not empty
    with Reader(bytes(blob)) as reader:
        assert reader.read("a") == SMOOTH
        with pytest.raises(ChecksumError, match="'b'"):
            reader.read("b")


def test_an_absent_section_is_named_with_those_that_exist():
    with Reader(toy()) as reader, pytest.raises(FormatError, match="no section 'z'; it has a, b, c"):
        reader.read("z")


def test_a_section_of_another_size_than_needed_is_refused():
    with Reader(toy()) as reader:
        assert len(reader.read("a", 5000)) == 5000
        with pytest.raises(FormatError, match="5000 bytes; its geometry needs 4999"):
            reader.read("a", 4999)


def test_every_bit_of_the_preamble_and_header_counts():
    blob = toy()
    body = len(header_of(blob)[1])
    for byte in (*range(PREAMBLE), *range(PREAMBLE + body, len(blob))):
        for bit in range(8):
            damaged = bytearray(blob)
            damaged[byte] ^= 1 << bit
            with pytest.raises(FormatError):
                Reader(bytes(damaged))


def test_a_file_of_another_kind_is_refused():
    for data in (b"", b"\x89PNG\r\n\x1a\n" + bytes(100), MAGIC, toy()[:11], forge(b"{}", magic=b"\x89MLXKV\n\n")):
        with pytest.raises(FormatError, match="not an mlxkv container"):
            Reader(data)


@pytest.mark.parametrize("version", [VERSION + 1, 0, 65535])
def test_another_version_is_refused(version):
    with pytest.raises(VersionError, match=str(version)):
        Reader(forge(b'{"sections":[]}', version=version))


def test_reserved_bytes_are_no_version():
    with pytest.raises(FormatError, match="reserved bytes"):
        Reader(forge(b'{"sections":[]}', reserved=1))


def test_verify_reads_every_checksum_without_inflating():
    blob = bytearray(toy())
    Reader(bytes(blob)).verify()
    blob[PREAMBLE + len(header_of(blob)[1]) - 1] ^= 1
    with pytest.raises(ChecksumError):
        Reader(memoryview(blob)).verify()


def test_a_damaged_header_is_told_from_a_damaged_section():
    blob = bytearray(toy())
    blob[-FOOTER - 3] ^= 1
    with pytest.raises(ChecksumError, match="header"):
        Reader(bytes(blob))


@pytest.mark.parametrize("length", [3, 2**31, 2**32 - 1, MAX_HEADER + 1])
def test_a_header_longer_than_the_file_is_refused(length):
    with pytest.raises(FormatError, match="truncated"):
        Reader(forge(b"{}", length=length))


@pytest.mark.parametrize("text", [b"", b"[]", b"nul", b"{", b"\xff", b"[" * 10**5, b'{"sections":[]'])
def test_a_header_that_is_no_json_object_is_refused(text):
    with pytest.raises(FormatError):
        Reader(forge(text))


@pytest.mark.parametrize(
    "table",
    [
        None,
        3,
        {},
        "a",
        [3],
        [[]],
        [row(b"")[:4]],
        [[*row(b""), 0]],
        [row(b"", name=None)],
        [row(b"", name=3)],
        [row(b"", coding="zstd")],
        [row(b"", coding=None)],
        [row(b"", size=-1)],
        [row(b"", size=-1, stored=-1)],
        [row(b"", size=True, stored=True)],
        [row(b"", size=0.0)],
        [row(b"", size="0")],
        [row(b"", size=1)],
        [row(b"", coding="rans", size=1)],
        [row(NOISE, coding="rans", size=1032 * 500 + 1)],
        [row(b"", size=10**30, stored=10**30)],
        [[*row(b"")[:4], None]],
        [row(b""), row(b"")],
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(table):
    with pytest.raises(FormatError):
        Reader(with_table(table))


def test_a_header_without_a_table_is_refused():
    with pytest.raises(FormatError, match="table"):
        Reader(forge(b"{}"))


def test_repeated_section_names_are_refused():
    with pytest.raises(FormatError, match="malformed"):
        Reader(with_table([row(NOISE), row(NOISE)], NOISE + NOISE))


def test_a_section_that_claims_more_than_deflate_can_hold_is_refused():
    bomb = zlib.compress(bytes(10**6), 9)
    Reader(with_table([row(bomb, coding="deflate", size=1032 * len(bomb))], bomb))
    with pytest.raises(FormatError, match="malformed"):
        Reader(with_table([row(bomb, coding="deflate", size=1032 * len(bomb) + 1)], bomb))


@pytest.mark.parametrize("size", [0, 1, 1000, 10**8 - 1])
def test_a_stream_that_inflates_to_more_than_declared_is_refused_within_its_declared_size(size):
    bomb = zlib.compress(bytes(10**8), 9)
    with Reader(with_table([row(bomb, coding="deflate", size=size)], bomb)) as reader:
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match="does not inflate to"):
                reader.read("a")
            assert tracemalloc.get_traced_memory()[1] < 2 * size + 10**6
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    "damage", [lambda s: s[:-1], lambda s: s + b"x", lambda s: s[:-5] + bytes(5), lambda s: b"no" + s]
)
def test_a_broken_stream_with_a_right_checksum_is_refused(damage):
    stored = damage(zlib.compress(SMOOTH))
    reader = Reader(with_table([row(stored, coding="deflate", size=5000)], stored))
    with reader, pytest.raises(FormatError, match="does not inflate"):
        reader.read("a")


def test_truncated_and_extended_files_are_refused():
    blob = toy()
    for keep in range(len(blob)):
        with pytest.raises(FormatError):
            Reader(blob[:keep])
    with pytest.raises(FormatError, match="truncated or extended"):
        Reader(blob + b"\0")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"absent\.mlxkv"):
        Reader(tmp_path / "absent.mlxkv")


def test_a_refused_file_is_closed_again(tmp_path, recwarn):
    (tmp_path / "odd").write_bytes(b"odd")
    with pytest.raises(FormatError):
        Reader(tmp_path / "odd")
    assert [warning for warning in recwarn if issubclass(warning.category, ResourceWarning)] == []


def test_a_section_describes_itself():
    section, stored = encode_section("n", NOISE)
    assert section == Section("n", "raw", 500, 500, digest(NOISE).hex())
    assert stored == NOISE

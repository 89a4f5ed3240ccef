"""The container's lossless codings: what they give back, how small they are, what hostile bytes can do."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from metal_host import installed

from mlxkv.errors import FormatError, InputError
from mlxkv.io import lossless
from mlxkv.io.container import Reader, encode_section, write
from mlxkv.io.lossless import CODINGS, MAX_EXPANSION, MAX_TABLES

HEADER = struct.Struct("<HHII")  # stride, tables, lanes, bytes of the model


def gaussian(size, spread=20.0, center=128, seed=0):
    noise = np.random.default_rng(seed).normal(center, spread, size)
    return np.clip(noise, 0, 255).astype(np.uint8).tobytes()


def payload(values=100_000, seed=0):
    """Like a coded block: planes of float16 scales, then int4 codes of Gaussian coefficients, two a byte."""
    random = np.random.default_rng(seed)
    scales = np.exp(random.normal(0, 0.4, values // 16)).astype("<f2").view(np.uint8).reshape(-1, 2)
    codes = np.clip(np.rint(random.normal(7.5, 2.5, 2 * values)), 0, 15).astype(np.uint8)
    return scales.T.tobytes() + (codes[::2] | codes[1::2] << 4).tobytes()


def rans(data):
    return lossless.encode("rans", data)


def floats(size=60_000):
    return np.random.default_rng(0).normal(size=size).astype("<f2").tobytes()


DATA = {
    "empty": b"",
    "one byte": b"\x07",
    "two bytes": b"\x07\x00",
    "a chunk less one": gaussian(511),
    "a chunk": gaussian(512),
    "a chunk and one": gaussian(513),
    "zeros": bytes(70_001),
    "noise": np.random.default_rng(1).bytes(5000),
    "changing": gaussian(9000, 3, 40) + gaussian(9001, 3, 200),
    "payload": payload(),
    "odd floats": floats(3000) + b"\x01",
}


def rans_parts(stored):
    """Header, inflated model, states and words of a rans section."""
    header = HEADER.unpack_from(stored)
    lanes, length = header[2:]
    states = 12 + length
    return header, zlib.decompress(stored[12:states]), stored[states : states + 4 * lanes], stored[states + 4 * lanes :]


def by_the_format(stored, size):
    """A decoder written from docs/format.md alone, one symbol at a time."""
    (stride, tables, lanes, _), model, states, words = rans_parts(stored)
    frequencies = [
        [model[k * 256 + s] + 256 * model[(tables + k) * 256 + s] for s in range(256)] for k in range(tables)
    ]
    chunks = -(-size // 512)
    which, counts = model[512 * tables :][:chunks], model[512 * tables + chunks :]
    states = list(struct.unpack(f"<{lanes}I", states))
    words = struct.unpack(f"<{len(words) // 2}H", words)
    taken = [sum(counts[plane * lanes + lane] << 8 * plane for plane in range(4)) for lane in range(lanes)]
    place = [sum(taken[:lane]) for lane in range(lanes)]
    symbols = bytearray()
    for i in range(size):
        lane, table, slot, symbol = i % lanes, frequencies[which[i // 512]], states[i % lanes] % 4096, 0
        while slot >= table[symbol]:
            slot -= table[symbol]
            symbol += 1
        states[lane] = table[symbol] * (states[lane] // 4096) + slot
        if states[lane] < 65536:
            states[lane] = states[lane] * 65536 + words[place[lane]]
            place[lane] += 1
        symbols.append(symbol)
    assert set(states) == {65536}
    starts = [sum(len(range(plane, size, stride)) for plane in range(p)) for p in range(stride)]
    return bytes(symbols[starts[i % stride] + i // stride] for i in range(size))


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("coding", CODINGS)
def test_every_coding_gives_the_bytes_back(coding, name):
    stored = lossless.encode(coding, DATA[name])
    assert lossless.decode(coding, stored, len(DATA[name])) == DATA[name]
    assert lossless.is_plausible(coding, len(DATA[name]), len(stored))


@pytest.mark.parametrize("name", ["one byte", "a chunk and one", "changing", "odd floats"])
def test_a_decoder_written_from_the_format_reads_rans(name):
    assert by_the_format(rans(DATA[name]), len(DATA[name])) == DATA[name]


def test_the_kernels_write_the_same_section():
    for name in ("one byte", "changing", "odd floats"):
        stored = rans(DATA[name])
        with installed():
            assert rans(DATA[name]) == stored
            assert lossless.decode("rans", stored, len(DATA[name])) == DATA[name]


def test_the_section_is_frozen():
    data = b"the quick brown fox jumps over the lazy dog"
    assert lossless.decode("rans", bytes.fromhex(GOLDEN), len(data)) == data
    # Deflate's own output differs between zlib versions, what it holds does not.
    found, frozen = rans_parts(rans(data)), rans_parts(bytes.fromhex(GOLDEN))
    assert found[0][:3] == frozen[0][:3]
    assert found[1:] == frozen[1:]


def test_deflate_is_zlib_at_its_default_level():
    assert lossless.encode("deflate", payload()) == zlib.compress(payload(), 6)


@pytest.mark.parametrize("coding", ["zstd", "", "RANS"])
def test_another_coding_is_refused(coding):
    with pytest.raises(InputError, match="deflate"):
        lossless.encode(coding, b"abc")
    with pytest.raises(FormatError):
        lossless.decode(coding, b"abc", 3)


def test_rans_is_smaller_than_deflate_on_a_payload():
    data = payload()
    assert len(rans(data)) < 0.98 * len(lossless.encode("deflate", data))


def test_lanes_and_tables_cost_less_than_a_hundredth():
    data = gaussian(400_000)
    shares = np.bincount(np.frombuffer(data, np.uint8)) / len(data)
    ideal = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * len(data) / 8
    stored = rans(data)
    assert ideal < len(stored) < 1.007 * ideal
    assert HEADER.unpack_from(stored)[2] > 250  # lanes for a GPU


def test_each_stretch_of_alike_bytes_gets_its_table():
    assert HEADER.unpack_from(rans(gaussian(50_000)))[1] == 1
    mixed = [gaussian(20_000, 4, 30 * place, seed) for seed, place in enumerate((1, 5, 3, 7, 1, 5, 3, 7))]
    stored = rans(b"".join(mixed))
    assert HEADER.unpack_from(stored)[1] >= 4
    assert len(stored) < 1.03 * sum(len(rans(part)) for part in mixed)


def test_alike_chunks_find_each_other_wherever_they_are():
    kinds = np.random.default_rng(4).integers(8, size=800)
    chunks = [gaussian(512, 4, 25 * kind + 30, seed) for seed, kind in enumerate(kinds)]
    sorted_out = [b"".join(chunks[i] for i in np.flatnonzero(kinds == kind)) for kind in range(8)]
    assert len(rans(b"".join(chunks))) < 1.01 * sum(map(len, map(rans, sorted_out)))


def test_floats_are_split_into_planes_and_payloads_are_not():
    wide = np.random.default_rng(0).normal(size=30_000).astype("<f4").tobytes()
    found = [HEADER.unpack_from(rans(data))[0] for data in (payload(), floats(), wide)]
    assert found == [1, 2, 4]
    assert len(rans(floats())) < 0.96 * len(lossless.encode("deflate", floats()))


@pytest.mark.parametrize("size", [1, 1000, 2047, 2048, 4095, 100_000, 3_000_000])
def test_rans_never_shrinks_further_than_a_reader_allows(size):
    stored = rans(bytes(size))
    assert size <= MAX_EXPANSION * len(stored)


def test_a_container_holds_rans_only_when_it_helps():
    random = np.random.default_rng(2).bytes(5000)
    out = io.BytesIO()
    write(out, {}, [encode_section("a", payload(), "rans"), encode_section("b", random, "rans")])
    with Reader(out.getvalue()) as reader:
        assert [section.coding for section in reader.sections.values()] == ["rans", "raw"]
        assert [reader.read("a"), reader.read("b")] == [payload(), random]
    with pytest.raises(InputError):
        encode_section("a", b"", "zstd")


def forged(stored, size):
    """A container that holds these stored bytes, with every checksum right."""
    section, _ = encode_section("a", stored, "raw")
    out = io.BytesIO()
    write(out, {}, [(type(section)("a", "rans", size, len(stored), section.digest), stored)])
    return out.getvalue()


def test_a_damaged_section_with_a_right_checksum_names_itself():
    stored = rans(payload())
    with Reader(forged(stored[:-2], len(payload()))) as reader, pytest.raises(FormatError, match="section 'a'"):
        reader.read("a")


def test_truncated_and_extended_sections_are_refused():
    stored = rans(gaussian(3000))
    for bad in (*(stored[:keep] for keep in range(0, len(stored), 3)), stored + b"\0", stored + b"\0\0"):
        with pytest.raises(FormatError):
            lossless.decode("rans", bad, 3000)
    for size in (0, 1, 2999, 3001, 3585, 10**6):
        with pytest.raises(FormatError):
            lossless.decode("rans", stored, size)


def edited(stored, **changes):
    names = ("stride", "tables", "lanes", "length")
    header = dict(zip(names, HEADER.unpack_from(stored))) | changes
    return HEADER.pack(*(header[name] for name in names)) + stored[12:]


HUGE = [{"lanes": n} for n in (0, 3, 2**20, 2**32 - 1)] + [{"length": n} for n in (0, 1, 2**20, 2**32 - 1)]
HUGE += [{"tables": n} for n in (0, 2, MAX_TABLES + 1, 65535)] + [{"stride": n} for n in (0, 3, 8, 65535)]


@pytest.mark.parametrize("changes", HUGE, ids=str)
def test_forged_headers_cost_no_memory(changes):
    stored = rans(gaussian(3000))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            lossless.decode("rans", edited(stored, **changes), 3000)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tables", [MAX_TABLES, MAX_TABLES + 1])
def test_more_tables_than_the_format_has_are_refused(tables):
    data = gaussian(3000)
    (_, _, lanes, _), model, states, words = rans_parts(rans(data))
    model = zlib.compress(model[:256] * tables + model[256:512] * tables + model[512:])
    stored = HEADER.pack(1, tables, lanes, len(model)) + model + states + words
    if tables <= MAX_TABLES:
        assert lossless.decode("rans", stored, 3000) == data
    else:
        with pytest.raises(FormatError, match="33 tables"):
            lossless.decode("rans", stored, 3000)


def test_a_bomb_in_the_model_is_not_inflated():
    bomb = zlib.compress(bytes(50_000_000), 9)
    stored = HEADER.pack(1, 1, 1, len(bomb)) + bomb + bytes(4)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="inflate"):
            lossless.decode("rans", stored, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_few_lanes_for_many_bytes_are_refused():
    stored = rans(bytes(2**20))
    lanes = HEADER.unpack_from(stored)[2]
    assert lanes == 512
    with pytest.raises(FormatError, match="511 lanes"):
        lossless.decode("rans", edited(stored, lanes=511), 2**20)


def test_random_damage_gives_a_typed_error_or_as_many_bytes():
    data = gaussian(700, 2, 40) + gaussian(700, 30, 100)
    stored, random, refused = rans(data), np.random.default_rng(5), 0
    for _ in range(60):
        bad = bytearray(stored)
        for place in random.integers(len(bad), size=random.integers(1, 4)):
            bad[place] = random.integers(256)
        try:
            assert len(lossless.decode("rans", bytes(bad), 1400)) == 1400
        except FormatError:
            refused += 1
    assert refused > 50


GOLDEN = (
    "01000100010000002d00000078da6360c00ffe305008e281402e3e7e7f3c18d48158fb211c86a10098a861082316d66001dc"
    "400c0065610c100aad10189071f16344dc17990a0f93e8285022dc9784d36f1d14"
)

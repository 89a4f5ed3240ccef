"""Interleaved rANS: a textbook coder is the meaning, the NumPy reference and the kernels write the same words."""

from dataclasses import replace

import constriction
import numpy as np
import pytest
from metal_host import HostError, installed

from mlxkv.errors import FormatError, InputError
from mlxkv.kernels import rans
from mlxkv.kernels.rans import MIN_STATE, TOTAL, Streams, frequencies

STREAMS = ("words", "counts", "states")


def job(size, lanes, tables=1, chunk=64, spread=20.0, seed=0):
    """Symbols and what codes them: (symbols, tables, which, chunk, lanes)."""
    random = np.random.default_rng(seed)
    which = random.integers(tables, size=-(-size // chunk)).astype(np.uint8)
    center = which[np.arange(size) // chunk] * (200 // tables) + 30
    symbols = np.clip(random.normal(center, spread), 0, 255).astype(np.uint8)
    counts = np.zeros((tables, 256), np.int64)
    np.add.at(counts, (which[np.arange(size) // chunk], symbols), 1)
    return symbols, frequencies(counts), which, chunk, lanes


def textbook(symbols, tables, which, chunk, lanes):
    """Each lane alone, with Python's integers, as in section 3 of arXiv 1311.2540."""
    words, counts, states = [], [], []
    for lane in range(lanes):
        state, own = 2**16, []
        for i in reversed(range(lane, len(symbols), lanes)):
            table = tables[which[i // chunk]].tolist()
            f, start = table[symbols[i]], sum(table[: symbols[i]])
            if state >= f << 20:
                own.append(state & 0xFFFF)
                state >>= 16
            state = (state // f << 12) + state % f + start
        words += reversed(own)
        counts.append(len(own))
        states.append(state)
    return Streams(*(np.array(a, kind) for a, kind in zip((words, counts, states), ("u2", "u4", "u4"))))


def assert_equal_streams(found, expected):
    for name in STREAMS:
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def check_both_ways(symbols, *model):
    tables, which, chunk, _ = model
    streams = rans.metal_encode(symbols, *model)
    assert_equal_streams(streams, rans.reference_encode(symbols, *model))
    for decode in (rans.metal_decode, rans.reference_decode):
        np.testing.assert_array_equal(decode(streams, tables, which, chunk, symbols.size), symbols)
    return streams


# size, lanes, tables, chunk
SHAPES = [(0, 1, 1, 1), (0, 5, 2, 8), (1, 1, 1, 1), (1, 40, 1, 9), (31, 32, 3, 2), (32, 32, 3, 2), (33, 32, 3, 2)]
SHAPES += [
    (999, 1, 2, 7),
    (1000, 33, 3, 1),
    (1000, 33, 3, 33),
    (1000, 33, 3, 100),
    (1000, 3, 256, 4),
    (5000, 70, 4, 512),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference_writes_the_textbook_s_words(shape):
    size, lanes, tables, chunk = shape
    symbols, *model = job(size, lanes, tables, chunk)
    assert_equal_streams(rans.reference_encode(symbols, *model), textbook(symbols, *model))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_write_and_read_the_same_words(kernel_path, shape):
    size, lanes, tables, chunk = shape
    symbols, *model = job(size, lanes, tables, chunk)
    check_both_ways(symbols, *model)


@pytest.mark.parametrize("spread", [0.01, 0.3, 1e3])
def test_degenerate_skewed_and_wide_tables_come_back(kernel_path, spread):
    symbols, *model = job(2000, 32, 2, 100, spread)
    check_both_ways(symbols, *model)


def test_a_certain_symbol_costs_no_words(kernel_path):
    streams = check_both_ways(np.full(700, 9, np.uint8), frequencies(np.eye(256)[9:10]), np.zeros(7, np.uint8), 100, 32)
    assert streams.words.size == 0
    assert (streams.states == MIN_STATE).all()


def test_all_bytes_alike_cost_a_byte_each(kernel_path):
    symbols = np.arange(4096, dtype=np.uint16).astype(np.uint8)
    streams = check_both_ways(symbols, np.full((1, 256), 16, np.uint16), np.zeros(1, np.uint8), 4096, 4)
    assert streams.words.size == 2048


def test_the_words_are_frozen():
    symbols = np.frombuffer(b"entropy coding, interleaved: one lane a stream", np.uint8)
    tables = frequencies(np.stack([np.bincount(part, minlength=256) for part in (symbols[:20], symbols[20:])]))
    streams = rans.encode(symbols, tables, np.array([0, 0, 1, 1, 1], np.uint8), 10, 3)
    found = [getattr(streams, name).astype(kind).tobytes().hex() for name, kind in zip(STREAMS, ("<u2", "<u4", "<u4"))]
    assert found == [
        "a11a98df19e7e9466557c7027b95371c",
        "030000000200000003000000",
        "d5645906405a027de80d6500",
    ]


def test_dispatch_follows_the_device(monkeypatch):
    symbols, *model = job(100, 4)
    monkeypatch.setattr(rans.metal, "available", lambda: False)
    streams = rans.encode(symbols, *model)
    monkeypatch.setattr(rans, "reference_encode", None)
    monkeypatch.setattr(rans, "reference_decode", None)
    with installed():
        assert_equal_streams(rans.encode(symbols, *model), streams)
        np.testing.assert_array_equal(rans.decode(streams, *model[:3], 100), symbols)


@pytest.mark.parametrize("spread", [0.8, 5, 40, 1e3])
def test_code_length_is_the_tables_cross_entropy_and_constriction_s_size(spread):
    symbols, *model = job(4096 * 16, 16, 2, 1024, spread)
    tables, which, chunk, _ = model
    streams = rans.encode(symbols, *model)
    bits = 16 * streams.words.size + 32 * streams.states.size
    spread_which = np.repeat(which, chunk)
    entropy = -np.log2(tables[spread_which, symbols] / TOTAL).sum()
    assert entropy <= bits <= 1.005 * entropy
    coder = constriction.stream.stack.AnsCoder()
    for index, table in enumerate(tables):
        used = np.flatnonzero(table)
        own = np.searchsorted(used, symbols[spread_which == index]).astype(np.int32)
        coder.encode_reverse(own, constriction.stream.model.Categorical(table[used] / TOTAL, perfect=False))
    assert bits == pytest.approx(coder.num_bits(), rel=0.005)


def test_a_symbol_that_its_table_lacks_is_refused(kernel_path):
    symbols, *model = job(100, 4)
    symbols[57] = 255
    for encode in (rans.metal_encode, rans.reference_encode):
        with pytest.raises(InputError, match="frequency 0"):
            encode(symbols, *model)


def test_models_that_do_not_fit_are_refused():
    symbols, tables, which, chunk, lanes = job(100, 4, 2, 10)
    streams = rans.encode(symbols, tables, which, chunk, lanes)
    one = np.outer([1, 0], np.arange(256) == tables[0].argmax())
    for bad in (
        ((tables + one).astype(np.uint16), which, chunk),
        ((tables - one).astype(np.uint16), which, chunk),
        (tables.astype(np.int32), which, chunk),
        (tables[:, :255], which, chunk),
        (tables[:0], which, chunk),
        (np.repeat(tables, 129, axis=0), which, chunk),
        (tables, which + np.uint8(1), chunk),
        (tables, which[:-1], chunk),
        (tables, which, 0),
        (tables, which[:1], 2**31),
    ):
        with pytest.raises(InputError):
            rans.encode(symbols, *bad, lanes)
        with pytest.raises(FormatError):
            rans.decode(streams, *bad, 100)
    for bad_lanes in (0, 2**31):
        with pytest.raises(InputError):
            rans.encode(symbols, tables, which, chunk, bad_lanes)
    for bad_symbols in (symbols.astype(np.int64), symbols.reshape(2, 50)):
        with pytest.raises(InputError, match="symbols"):
            rans.encode(bad_symbols, tables, which, chunk, lanes)


def damaged(streams, random):
    """Words, counts or states changed in up to three places; their number stays."""
    name = STREAMS[random.integers(3)]
    part = getattr(streams, name).copy()
    for _ in range(random.integers(1, 4)):
        place, other = random.choice(part.size, 2, replace=False)
        if name == "counts":
            moved = random.integers(part[place] + 1)
            part[place] -= moved
            part[other] += moved
        else:
            part[place] = random.integers(2 ** (8 * part.itemsize))
    return replace(streams, **{name: part})


def outcome(decode, *call):
    try:
        return decode(*call).tobytes()
    except FormatError:
        return "refused"


def check_damage(repeats):
    symbols, *model = job(600, 9, 2, 50)
    streams, random, refused = rans.reference_encode(symbols, *model), np.random.default_rng(3), 0
    for _ in range(repeats):
        call = (damaged(streams, random), *model[:3], 600)
        found = outcome(rans.metal_decode, *call)
        assert found == outcome(rans.reference_decode, *call)
        refused += found == "refused"
    return refused


def test_damaged_streams_are_refused_or_read_alike_within_bounds(kernel_path):
    assert check_damage(40) > 30


def test_a_word_that_no_lane_needs_is_refused(kernel_path):
    symbols, *model = job(600, 9, 2, 50)
    streams = rans.encode(symbols, *model)
    last = np.arange(9) == 8
    longer = Streams(
        np.append(streams.words, streams.words[-1:]), streams.counts + last.astype(np.uint32), streams.states
    )
    for decode in (rans.metal_decode, rans.reference_decode):
        with pytest.raises(FormatError, match="damaged"):
            decode(longer, *model[:3], 600)


def test_streams_of_the_wrong_size_are_refused():
    symbols, *model = job(600, 9, 2, 50)
    streams = rans.encode(symbols, *model)
    more = np.append(streams.words, np.uint16(0))
    for bad in (
        replace(streams, words=streams.words.astype(np.uint32)),
        replace(streams, words=more),
        replace(streams, words=more[:-2]),
        replace(streams, counts=streams.counts[:-1]),
        replace(streams, counts=streams.counts[:0], states=streams.states[:0]),
        replace(streams, counts=streams.counts + np.uint32(2**31)),
    ):
        with pytest.raises(FormatError):
            rans.decode(bad, *model[:3], 600)
    for size in (0, 599, 601, 2**31):
        with pytest.raises(FormatError):
            rans.decode(streams, *model[:3], size)


FAULTS = [
    ("rans_encode", "(size - 1 - lane)", "(size - lane)"),
    ("rans_encode", "lane < size ? ", "true ? "),
    ("rans_encode", "lane + (left - 1) * lanes", "lane + left * lanes"),
    ("rans_encode", "uint(which[part]) * 256", "uint(which[part]) * 255"),
    ("rans_encode", ">= frequency", "> frequency"),
    ("rans_encode", "state >> 20", "state >> 19"),
    ("rans_encode", "full ? state >> 16", "full ? state >> 15"),
    ("rans_encode", "(4096 - frequency)", "(4095 - frequency)"),
    ("rans_encode", "- place_step;", "- place_step + 1;"),
    ("rans_encode", "place < place_step ? 1", "place <= place_step ? 1"),
    ("rans_encode", "known ? state : 0", "state"),
    ("rans_decode", "<< 12) |", "<< 11) |"),
    ("rans_decode", "index < size", "index <= size"),
    ("rans_decode", "entry >> 24", "entry >> 23"),
    ("rans_decode", "& 4095) + 1)", "& 4095))"),
    ("rans_decode", "state < (1u << 16)", "state <= (1u << 16)"),
    ("rans_decode", "(state << 16)", "(state << 15)"),
    ("rans_decode", "metal::min(next, last)", "next"),
    ("rans_decode", "next += 1", "next += 2"),
    ("rans_decode", "place < chunk ? 0 : 1", "place <= chunk ? 0 : 1"),
    ("rans_decode", "place < chunk ? 0 : chunk", "place < chunk ? 0 : chunk + 1"),
]


def check_everything():
    for size, lanes, tables, chunk in SHAPES:
        symbols, *model = job(size, lanes, tables, chunk)
        check_both_ways(symbols, *model)
    check_damage(8)
    symbols[7] = 255
    try:
        rans.metal_encode(symbols, *model)
    except InputError:
        return
    raise AssertionError("a symbol without frequency was encoded")


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[2]}")
def test_planted_faults_are_caught(fault):
    with installed(fault), pytest.raises((AssertionError, HostError, FormatError, InputError)):
        check_everything()


def test_without_a_fault_nothing_is_caught(kernel_path):
    check_everything()

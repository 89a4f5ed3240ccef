import copy
import dataclasses
import tracemalloc
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from forging import forge, header_of
from synthetic import toy_artifacts, toy_dump

from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.plan import Group, Plan
from mlxkv.codec.summary import summary
from mlxkv.errors import FormatError, MismatchError, MlxkvError
from mlxkv.io.container import Reader, digest

HUGE = [2**31, 2**32, 2**40, 2**63, 2**64, 10**15, 10**30, 10**400]
ODD = [
    None,
    True,
    False,
    [],
    {},
    "",
    "x",
    [1],
    [[]],
    {"a": 1},
    0,
    1,
    -1,
    0.5,
    1e308,
    -(10**30),
    float("inf"),
    float("nan"),
    "\ud800",
]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return CacheCodec(toy_artifacts(tmp_path_factory.mktemp("corruption")), recent=3, sinks=2)


@pytest.fixture(scope="module")
def blob(codec):
    return codec.compress_dump(toy_dump(length=40, states=True))


@pytest.fixture(scope="module")
def expected(codec, blob):
    return codec.decompress_dump(blob)


def same(found, expected):
    pairs = [(found.k, expected.k), (found.v, expected.v), (found.tokens, expected.tokens)]
    pairs += [(found.states[key], expected.states[key]) for key in expected.states]
    return found.states.keys() == expected.states.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


def survives(codec, data, expected):
    """True when the data still decodes to exactly the original; whatever else happens must be an MlxkvError."""
    try:
        found = codec.decompress_dump(data)
    except MlxkvError:
        return False
    assert same(found, expected)
    return True


def flip(blob, random):
    damaged = bytearray(blob)
    for place in random.integers(len(blob) * 8, size=random.integers(1, 4)):
        damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def resize(blob, random):
    return blob[: random.integers(len(blob))] if random.random() < 0.8 else blob + random.bytes(random.integers(1, 99))


def overwrite(blob, random):
    start = random.integers(len(blob))
    part = random.bytes(random.integers(1, 60)) if random.random() < 0.7 else bytes(random.integers(1, 60))
    return (blob[:start] + part + blob[start + len(part) :])[: len(blob)]


def cut_out(blob, random):
    start, stop = sorted(random.integers(len(blob), size=2))
    return blob[:start] + blob[stop + 1 :]


def swap_sections(blob, random):
    header, rest = header_of(blob)
    ends = np.cumsum([0, *(row[3] for row in header["sections"])])
    parts = [rest[a:b] for a, b in pairwise(ends)]
    first, second = random.choice([i for i, part in enumerate(parts) if part], 2, replace=False)
    parts[first], parts[second] = parts[second], parts[first]
    return blob.replace(rest, b"".join(parts))


def places(value, path=()):
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def free(header):
    """What only describes itself: any other value there makes another container that is just as valid."""
    raw = header.get("raw")
    state = raw.get("state.0.0") if isinstance(raw, dict) else None
    return [header.get("meta"), state[1] if isinstance(state, list) and len(state) == 2 else None]


def edit(blob, random):
    header, rest = header_of(blob)
    for _ in range(random.integers(1, 3)):
        found = [place for place in places(header) if not any(place[0] is part for part in free(header))]
        parent, key = found[random.integers(len(found))]
        mutate(parent, key, random)
    return forge(header, rest)


def mutate(parent, key, random):
    value, choice = parent[key], random.integers(6)
    if choice == 0:
        del parent[key]
    elif choice == 1:
        parent[key] = copy.deepcopy(ODD[random.integers(len(ODD))])
    elif choice == 2:
        parent[key] = HUGE[random.integers(len(HUGE))]
    elif choice == 3 and type(value) is int:
        parent[key] = value + int(random.choice([-8, -1, 1, 2, 100]))
    elif choice == 4 and isinstance(value, str) and value:
        place = random.integers(len(value))
        parent[key] = value[:place] + chr(random.integers(32, 300)) + value[place + 1 :]
    elif isinstance(parent, dict):
        parent[f"extra{random.integers(10)}"] = copy.deepcopy(value)
    else:
        parent.insert(key, copy.deepcopy(value))


def test_the_blob_is_small_and_intact(codec, blob, expected):
    assert len(blob) < 10_000
    assert survives(codec, blob, expected)
    assert same(codec.decompress_dump(forge(*header_of(blob))), expected)


# 10,000 corruptions in all.
@pytest.mark.parametrize("damage", [flip, resize, overwrite, cut_out, swap_sections], ids=lambda f: f.__name__)
def test_damaged_bytes_are_always_refused(codec, blob, damage):
    random = np.random.default_rng(len(damage.__name__))
    for _ in range(1200):
        data = damage(blob, random)
        if data != blob:
            with pytest.raises(FormatError):
                codec.decompress_dump(data)


@pytest.mark.parametrize("seed", range(4))
def test_forged_headers_are_refused_or_change_nothing(codec, blob, expected, seed):
    random = np.random.default_rng(seed)
    intact = sum(survives(codec, edit(blob, random), expected) for _ in range(1000))
    assert 0 < intact < 500


def test_what_the_decoder_does_not_use_may_change(codec, blob, expected):
    header, rest = header_of(blob)
    for edited in (
        {**header, "mlxkv": "9.9"},
        {**header, "meta": {**header["meta"], "note": [1]}},
        {**header, "new": {}},
    ):
        assert survives(codec, forge(edited, rest), expected)


def test_every_part_of_the_header_is_needed(codec, blob):
    header, rest = header_of(blob)
    for key in set(header) - {"mlxkv"}:
        with pytest.raises((FormatError, MismatchError)):
            codec.decompress_dump(forge({k: v for k, v in header.items() if k != key}, rest))


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


def set_at(header, path, value):
    edited = copy.deepcopy(header)
    target = edited
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return edited


LAYOUT = [("layout", key) for key in ("batch", "length", "s", "w", "block")]
SHAPES = [("raw", name, 1, axis) for name in ("k.sink", "v.window") for axis in range(5)] + [("raw", "tokens", 1, 0)]
TABLE = [("sections", row, column) for row in (0, 4, -1) for column in (2, 3)]


@pytest.mark.parametrize("path", LAYOUT + SHAPES + TABLE, ids=str)
def test_huge_numbers_cost_no_memory(codec, blob, expected, path):
    header, rest = header_of(blob)
    for value in HUGE:
        with little_memory():
            survives(codec, forge(set_at(header, path, value), rest), expected)


@pytest.mark.parametrize("huge", HUGE)
def test_a_huge_cache_without_coded_tokens_costs_no_memory(codec, blob, huge):
    header, rest = header_of(blob)
    for changes in ({"length": huge, "w": huge}, {"length": huge, "s": huge}, {"batch": huge, "w": 40}):
        header["layout"].update({"batch": 1, "length": 40, "s": 2, "w": 3, **changes})
        for name in ("k.sink", "k.window", "v.sink", "v.window"):
            header["raw"][name][1] = [3, header["layout"]["batch"], 2, huge, 8]
        with little_memory(), pytest.raises(FormatError):
            codec.decompress_dump(forge(header, rest))


@pytest.mark.parametrize("huge", HUGE)
def test_a_huge_batch_without_raw_tokens_costs_no_memory(codec, huge):
    dump = toy_dump(length=40)
    header, rest = header_of(CacheCodec(codec.artifacts, recent=0, sinks=0).compress(list(dump.k), list(dump.v)))
    header["layout"]["batch"] = huge
    for described in header["raw"].values():
        described[1][1] = huge
    with little_memory(), pytest.raises(FormatError):
        codec.decompress(forge(header, rest))


def test_an_empty_array_of_an_impossible_shape_is_refused(codec, blob):
    header, rest = header_of(blob)
    for shape in ([0, 10**30], [0, 2**62, 2**62], [2**40] * 7 + [0], [0] * 9):
        edited = copy.deepcopy(header)
        edited["sections"].append(["state.1.0", "raw", 0, 0, digest(b"").hex()])
        edited["raw"]["state.1.0"] = ["float32", shape]
        with pytest.raises(FormatError):
            codec.decompress_dump(forge(edited, rest))
        edited["raw"]["state.1.0"] = ["float32", [0, 7]]
        assert codec.decompress_dump(forge(edited, rest)).states["1.0"].shape == (0, 7)


def test_tokens_of_another_type_are_refused(codec, blob):
    header, rest = header_of(blob)
    with pytest.raises(FormatError, match="no tokens"):
        codec.decompress_dump(forge(set_at(header, ("raw", "tokens", 0), "float32"), rest))


def test_a_plan_that_ends_in_nothing_still_decodes(codec):
    part, facts = codec.artifacts.k, codec.artifacts
    basis = np.concatenate([part.V, np.ones((48, 1), np.float16)], axis=1)
    longer = dataclasses.replace(part, V=basis, plan=Plan((*part.plan.groups, Group(1, "none"))))
    dump = toy_dump(length=40)
    found = []
    for artifacts in (facts, dataclasses.replace(facts, k=longer)):
        same_ends = CacheCodec(artifacts, recent=3, sinks=2)
        found.append(
            np.stack(same_ends.decompress(same_ends.compress(list(dump.k), list(dump.v)))[0], dtype=np.float32)
        )
    assert np.abs(found[0] - found[1]).mean() < 1e-3


def test_the_summary_of_a_forged_header_is_refused_or_plain(blob):
    random, plain = np.random.default_rng(7), 0
    for _ in range(1000):
        try:
            with Reader(edit(blob, random)) as reader:
                plain += summary(reader)["file_bytes"] == reader.size
        except FormatError:
            continue
    assert 0 < plain < 700

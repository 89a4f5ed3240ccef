"""How `klt` splits bytes over layers: within the room, the same each time, and more where errors cost more."""

import itertools
import json
import time

import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv import live, lm
from mlxkv.calibration import training
from mlxkv.calibration.costs import Costs, recorded_attention
from mlxkv.codec import library
from mlxkv.codec.calibrate import codec_config
from mlxkv.dump import write_dump
from mlxkv.errors import FormatError, LibraryWarning
from mlxkv.kernels.digit_attention import DIGITS
from mlxkv.live.klt import tables
from mlxkv.live.klt.tables import LayerTable, Tables, default, live_slots, tables_of
from mlxkv.models import cache_spec
from mlxkv.models.probe import ATTENTION, attention_modules
from mlxkv.sensitivity import dump_with_sensitivity
from mlxkv.spec import Slot

ROWS = (64, 256, 704)
KINDS = ("llama", "glm4_moe_lite", "lfm2")  # usual, latents, and layers that keep other state among others


def some_slots(layers=4, heads=2, dim=32):
    return dict.fromkeys(range(layers), (Slot("keys", heads, dim), Slot("values", heads, dim)))


def some_tables(slots, seed=0):
    random = np.random.default_rng(seed)

    def table(pair):
        spectra = [-np.sort(random.uniform(0, 12, (slot.heads, slot.dim)), axis=1) for slot in pair]
        weights = [np.sort(random.uniform(-3, 3, (slot.heads, 3)))[:, ::-1] for slot in pair]
        return LayerTable(*spectra, *weights)

    return Tables({layer: table(pair) for layer, pair in slots.items()})


def bytes_of(slots, split, rows=ROWS):
    """Bytes of rows, places and orders as the cache keeps them."""
    total = 0
    for layer, pair in slots.items():
        for slot, digits in zip(pair, split[layer]):
            total += slot.heads * sum(n // 4 * count + 2 * n for n, count in zip(digits, rows))
            total += slot.heads * max(digits) * (1 if slot.dim <= 256 else 2)
    return total


def flat(split):
    return np.array([list(split[layer]) for layer in split])


@pytest.fixture(scope="module")
def measured():
    """Facts of two stretches, by model."""

    def facts(name):
        model = tiny_model(name)
        costs = Costs(cache_spec(model))
        for seed in range(2):
            costs.measure(model, dump_with_sensitivity(model, tiny_tokens(200, seed=seed)))
        return model, dict(costs.facts())

    return {name: facts(name) for name in KINDS}


@pytest.mark.parametrize("room", [3_000, 10_000, 20_000, 100_000])
def test_a_split_keeps_within_its_room_and_leaves_little_of_it(room):
    slots = some_slots()
    split = some_tables(slots).split(slots, room, ROWS)
    used, full = bytes_of(slots, split), bytes_of(slots, dict.fromkeys(slots, ((4 * 32,) * 3,) * 2))
    least = bytes_of(slots, dict.fromkeys(slots, ((4, 4, 4),) * 2))
    assert used <= max(room, least)
    assert used >= 0.93 * min(room, full)  # a row's byte of all heads, and orders, of which the longest alone is kept
    assert (flat(split) % 4 == 0).all()
    assert flat(split).min() >= 4
    assert flat(split).max() <= DIGITS * 32


def test_more_room_takes_digits_from_no_row_and_the_same_room_gives_the_same():
    slots = some_slots()
    known = some_tables(slots)
    splits = [flat(known.split(slots, room, ROWS)) for room in range(5_000, 60_000, 5_000)]
    assert all((after >= before).all() for before, after in itertools.pairwise(splits))
    assert (flat(some_tables(slots).split(slots, 20_000, ROWS)) == flat(known.split(slots, 20_000, ROWS))).all()


def test_layers_heads_and_tokens_whose_errors_cost_more_get_more_digits():
    slots = some_slots()
    alike = default(slots)
    before = flat(alike.split(slots, 30_000, ROWS))
    assert np.ptp(before, axis=0).max() <= 4  # the last bytes do not suffice for all
    assert (before[..., 0] > before[..., 2]).all()  # what gets attention
    layer = alike.layers[1]
    dear = Tables({**alike.layers, 1: layer._replace(keys=layer.keys + 6)})
    after = flat(dear.split(slots, 30_000, ROWS))
    assert (after[1, 0] > before[1, 0]).all()
    assert (after[0] <= before[0]).all()


def test_a_split_of_a_large_model_takes_milliseconds():
    slots = some_slots(48, 8, 128)
    known = some_tables(slots)
    best = min(timed(lambda: known.split(slots, 5e6, ROWS), time.process_time) for _ in range(3))
    assert best < 0.2  # 0.03 on an idle machine


def timed(work, clock):
    start = clock()
    work()
    return clock() - start


@pytest.mark.parametrize("name", KINDS)
def test_tables_of_any_kind_of_model_come_back_from_json_as_they_were(measured, name):
    model, facts = measured[name]
    slots = live_slots(cache_spec(model))
    once = Tables.from_json(json.loads(json.dumps(facts["klt"])), slots)
    again = Tables.from_json(once.to_json(), slots)
    assert again.to_json() == once.to_json() == facts["klt"]
    assert once.layers.keys() == slots.keys()
    for layer, pair in slots.items():
        assert [part.shape for part in once.layers[layer]] == [
            (slot.heads, width or slot.dim) for width in (None, 3) for slot in pair
        ]
        assert all(np.isfinite(part).all() for part in once.layers[layer])
    assert len(json.dumps(facts)) < 20_000


def test_what_is_measured_are_eigenvalues_times_sensitivity_and_energy_by_attention():
    model = tiny_model("llama")
    tokens = tiny_tokens(200, seed=5)
    dump, costs = dump_with_sensitivity(model, tokens), Costs(cache_spec(model))
    costs.measure(model, dump)
    found = Tables.from_json(costs.facts()["klt"], live_slots(costs.spec)).layers
    attention = recorded_attention(model, tokens[:152])
    differences = []
    for layer in range(2):
        for head in range(2):
            x = dump.k[layer, 0, head, 4:].astype(np.float64)
            values = np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1]
            wanted = np.log2(values * np.trace(dump.sensitivity["k"][layer, head]) / 8)
            differences.append(found[layer].keys[head] - wanted)
            energy = dump.sensitivity["v.energy"][layer, head]
            counted = np.flatnonzero(energy)
            by_rank = energy[counted[np.argsort(-attention[layer][head, counted])]]
            first = by_rank[: len(counted) // 16].mean() / by_rank.mean()
            assert found[layer].value_weights[head, 0] == pytest.approx(np.log2(first), abs=0.13)
    assert np.ptp(np.concatenate(differences)) <= 0.26  # differences between layers are kept, to quarters


def test_recorded_attention_is_what_the_last_queries_give_and_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    live.detach(model)
    attention = recorded_attention(model, tiny_tokens(300))
    sums = attention[0].sum(axis=1)
    assert attention[0].shape == (2, 300)
    seen = np.minimum(np.arange(300, 0, -1), 256)
    group = (attention[0] * seen).sum(axis=1) / 256  # each query gives 1, from each of the query heads of a head
    assert group == pytest.approx(np.full(2, round(group[0])), rel=1e-3)
    assert (sums > 0).all()
    assert not any(hasattr(getattr(module, ATTENTION), "__wrapped__") for module in attention_modules(model))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data | {"version": 99},
        lambda data: {"version": 1},
        lambda data: data | {"layers": {"0": data["layers"]["0"]}},
        lambda data: data | {"layers": {**data["layers"], "1": data["layers"]["1"][:3]}},
        lambda data: data | {"layers": {**data["layers"], "1": [5, *data["layers"]["1"][1:]]}},
        lambda data: data | {"layers": {**data["layers"], "1": ["AAAA", *data["layers"]["1"][1:]]}},
        lambda data: data | {"layers": {**data["layers"], "1": ["no base64!", *data["layers"]["1"][1:]]}},
        lambda data: [data],
        lambda data: None,
    ],
)
def test_tables_that_are_none_are_refused(measured, change):
    model, facts = measured["llama"]
    with pytest.raises(FormatError, match=r"klt's tables|tables of klt"):
        Tables.from_json(change(facts["klt"]), live_slots(cache_spec(model)))


def in_library(model, facts, tmp_path, monkeypatch):
    """Artifacts of a model in a library of its own, with these facts."""
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(tables, "_found", {})
    path = tmp_path / "dump.npz"
    write_dump(path, lm.dump(model, tiny_tokens(100), fingerprint=lm.fingerprint(model)))
    artifacts = training.train([path], codec_config("kvtc-4"))
    artifacts.meta.update(facts)
    library.add(artifacts)


def test_tables_of_a_model_are_those_of_its_calibration(measured, tmp_path, monkeypatch):
    model, facts = measured["llama"]
    spec = cache_spec(model)
    in_library(model, facts, tmp_path, monkeypatch)
    assert tables_of(model, spec).to_json() == facts["klt"]
    assert tables_of(model, spec) is tables_of(model, spec)
    other = tiny_model("lfm2")
    assert tables_of(other, cache_spec(other)).to_json() == default(live_slots(cache_spec(other))).to_json()


def test_damaged_tables_of_a_calibration_are_skipped_and_said(measured, tmp_path, monkeypatch):
    model, facts = measured["llama"]
    in_library(model, {"klt": {**facts["klt"], "version": 7}}, tmp_path, monkeypatch)
    with pytest.warns(LibraryWarning, match=r"skipped.*klt"):
        found = tables_of(model, cache_spec(model))
    assert found.to_json() == default(live_slots(cache_spec(model))).to_json()


def test_a_model_without_calibration_has_layers_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(tmp_path / "none"))
    monkeypatch.setattr(tables, "_found", {})
    model = tiny_model("llama")
    found = tables_of(model, cache_spec(model)).layers
    assert all((part == other).all() for part, other in zip(found[0], found[1]))

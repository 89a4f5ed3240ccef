"""The codec's ablations change what they say and nothing else, and are compared with the method's curve in equal bytes."""

import numpy as np
import pytest
from synthetic import toy_dump

from benchmarks import codec_ablation as ablation
from benchmarks.codec_ablation import CURVE, GROUP, Change, Directions
from mlxkv.codec.methods.kvtc import group_errors
from mlxkv.codec.stages.plan import cost
from mlxkv.evaluate import metrics


@pytest.fixture(scope="module")
def codecs():
    changes = {"base": Change(3), "rotated": Change(3, rotated=True), "layered": Change(3, layered=True)}
    return ablation.codecs(changes, [toy_dump(seed=seed) for seed in range(2)], ablation.RANK)


@pytest.mark.parametrize("name", ["base", "rotated", "layered"])
def test_every_change_brings_the_cache_back_as_the_model_had_it(codecs, name):
    dump = toy_dump(seed=9)
    back = codecs[name].decompress_dump(codecs[name].compress_dump(dump))
    assert back.spec == dump.spec
    assert max(metrics.relative_error(dump.stream(kind), back.stream(kind)) for kind in "kv") < 0.1


def test_keys_coded_as_rotated_lose_more_and_values_the_same(codecs):
    dump = toy_dump(seed=9)
    base, rotated = (codecs[name].decompress_dump(codecs[name].compress_dump(dump)) for name in ("base", "rotated"))
    assert metrics.relative_error(dump.k, rotated.k) > 2 * metrics.relative_error(dump.k, base.k)
    np.testing.assert_array_equal(rotated.v, base.v)


def test_a_basis_for_each_layer_mixes_no_layers(codecs):
    V = codecs["layered"].artifacts.k.V.astype(np.float32)
    layers = np.abs(V.reshape(3, -1, V.shape[1])).max(axis=1)
    assert ((layers > 0).sum(axis=0) == 1).all()
    np.testing.assert_allclose(V.T @ V, np.eye(V.shape[1]), atol=5e-3)
    assert (np.abs(codecs["base"].artifacts.k.V.reshape(3, -1, 1)).max(axis=1) > 0).all()


def energies(*groups):
    return Directions(np.zeros(0), np.zeros((0, 0)), np.repeat(np.array(groups, float), GROUP), {})


def test_water_filling_gives_each_group_the_bits_of_its_rate():
    level = 1e-3
    rates = np.array([9, 6.1, 5.9, 3.1, 2.9, 1.1, 0.9, 0.1])
    kinds = ["fp8", "fp8", "int4", "int4", "int2", "int2", "none", "none"]
    budget = sum(cost(GROUP, kind) for kind in kinds)
    plan = ablation.water_filled(energies(*level * 4**rates), budget)
    assert [group.kind for group in plan.groups] == kinds
    assert plan.bits == budget


def test_plans_spend_what_they_may_and_not_more():
    random = np.random.default_rng(0)
    found = energies(*np.sort(random.lognormal(0, 3, 20))[::-1])
    dearest = cost(GROUP, "fp8") - cost(GROUP, "int4")
    for budget in range(400, 3000, 130):
        for plan in (ablation.equal(found, budget), ablation.water_filled(found, budget)):
            assert budget - max(dearest, cost(GROUP, "int4")) < plan.bits <= budget


def test_the_dynamic_programme_beats_the_plans_it_is_compared_with():
    rows = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32) / (1 + np.arange(256)) ** 0.7
    errors = group_errors(rows)
    found = Directions(np.zeros(0), np.zeros((0, 0)), np.square(rows, dtype=float).mean(axis=0), errors)

    def loss(plan):
        start, total = 0, found.energy[plan.rank :].sum()
        for group in plan.groups:
            stop = start + group.size
            total += found.energy[start:stop].sum() if group.kind == "none" else errors[group.size, group.kind][start]
            start = stop
        return total

    best = loss(ablation.programmed(found, 600))
    assert best < min(loss(ablation.equal(found, 600)), loss(ablation.water_filled(found, 600)))


def sample(variant, text, size, kl):
    return {
        "variant": variant, "text": text, "cache_bytes": size, "ratio": 1e6 / size, "kl": kl,
        "top1_agreement": 1.0, "perplexity_delta": 0.0,
    }  # fmt: skip


@pytest.fixture
def result():
    samples = []
    for text, kl in enumerate(np.linspace(0.01, 0.02, 10).tolist()):
        for name, size, times in zip(CURVE, (4000, 2000, 1000), (1, 2, 4)):
            samples.append(sample(name, text, size, times * kl))
        samples.append(sample("same", text, 2000, 2 * kl * (1.1 if text % 2 else 1 / 1.08)))
        samples.append(sample("half", text, 2000, kl))
        samples.append(sample("twice", text, 1000, 8 * kl))
        samples.append(sample("tiny", text, 10, 4 * kl))
    return {"config": {"length": 768}, "summary": ablation.summarise(samples)}


def test_a_change_is_compared_with_the_methods_kl_in_its_bytes(result):
    rows = {row["variant"]: row for row in result["summary"]}
    assert [rows[name]["kl_ratio"] for name in ("same", "half", "twice", "tiny")] == pytest.approx(
        [1, 0.5, 2, 1], rel=0.01
    )
    assert [rows[name]["beyond_curve"] for name in ("same", "half", "twice", "tiny")] == [0, 0, 0, 10]
    assert rows["half"]["p_corrected"] == pytest.approx(4 * 2 / 2**10)
    assert "p" not in rows["kvtc at 4x"]


def test_the_section_says_what_the_numbers_say(result):
    text = ablation.section(result)
    assert "More KL than the method in equal bytes: twice (2.00 times)." in text
    assert "Less: half (0.50 times)." in text
    assert "No difference shown: same (1.01 times), tiny (1.00 times)." in text
    assert "held against its end: tiny." in text
    assert "cannot show" not in text


def test_the_picture_has_a_row_for_every_change(result):
    (axes,) = ablation.figure(result).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(labels) == ["half", "same", "tiny", "twice"]
    places = {label: line.get_xdata()[0] for label, line in zip(labels, axes.lines[1::2])}
    assert places["twice"] == pytest.approx(2)

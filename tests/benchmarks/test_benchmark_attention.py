"""The attention benchmarks: regions, spectra and verdicts follow from the numbers; reports come from JSON alone."""

import json

import mlxkv  # noqa: F401

# isort: split
import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import attention_analysis, energy_spectrum
from benchmarks.energy_spectrum import COUNTED, UNCOUNTED
from benchmarks.schema import RESULTS
from mlxkv.evaluate.tasks import attention

LAYERS = 3
BINS = attention.BINS + 2


def looked(variant, seed, middle):
    """A record of which `middle` of the attention goes to the middle, and a quarter to the first tokens."""
    mass = np.zeros((LAYERS, BINS))
    mass[:, 0], mass[:, 4], mass[:, -1] = 0.25, middle, 0.75 - middle
    scores = dict.fromkeys(attention.SCORES, 0.125)
    return {
        "part": "attention",
        "variant": variant,
        "seed": seed,
        "ratio": 4.0,
        **scores,
        "by_layer": {score: [0.1] * LAYERS for score in scores},
        "mass_by_position": mass.tolist(),
    }


def result(counted, without):
    """What would be in the file of three seeds where the whole cache gives the middle 0.4."""
    masses = {"whole": 0.4, COUNTED: counted, UNCOUNTED: without, "int4": 0.4}
    samples = [looked(name, seed, middle + 0.001 * seed) for seed in range(3) for name, middle in masses.items()]
    shares = [[0.5, 0.75, 0.9]] * LAYERS
    samples += [{"part": "spectrum", "seed": 0, "keys": shares, "rotated keys": shares, "values": shares}]
    config = {"at": 512, "queries": 32, "seeds": 3, "dims": [8, 16, 32], "head_dim": 64}
    summary = energy_spectrum.summarise(samples)
    return json.loads(json.dumps({"config": config, "summary": summary, "samples": samples, "quick": False}))


def test_the_share_of_variance_is_that_of_the_first_components():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.normal(size=(64, 64)))[0]
    spread = np.where(np.arange(64) < 8, 3.0, np.where(np.arange(64) < 16, 1.0, 0.0))
    x = 100 + (random.normal(size=(2, 2_000, 64)) * spread) @ basis  # a mean has no variance
    assert energy_spectrum.energy(x) == pytest.approx([0.9, 1, 1], abs=0.02)


def test_regions_hold_all_of_the_attention_once():
    mass = np.arange(BINS, dtype=float)
    found = energy_spectrum.regions({"mass_by_position": [mass, mass]})
    assert np.concatenate(list(found.values())).tolist() == mass.tolist()
    assert [len(part) for part in found.values()] == [1, attention.BINS - 1, 1, 1]


@pytest.mark.parametrize(
    ("counted", "without", "words"),
    [
        (0.3, 0.1, ("30.1 % with", "10.1 % without", "share nearer to")),
        (0.7, 0.3, ("70.1 % with", "30.1 % without", "share no nearer to")),
    ],
)
def test_the_verdict_on_counts_follows_from_the_middle(counted, without, words):
    text = energy_spectrum.section(result(counted, without))
    assert all(word in text for word in words), text.splitlines()[0]
    assert "the middle 40.1 % of attention" in text
    assert "p = 0.25 by sign flips over 3 sample(s)" in text


def test_scores_over_tokens_are_left_out_where_counts_are_unknown():
    rows = {line.split(" | ")[0]: line for line in energy_spectrum.section(result(0.3, 0.1)).splitlines()}
    assert "0.125" in rows[f"| {COUNTED}"]
    assert "0.125" not in rows[f"| {UNCOUNTED}"]


@pytest.mark.parametrize("benchmark", [energy_spectrum, attention_analysis])
def test_a_report_is_made_from_json_alone_and_twice_the_same(benchmark):
    if benchmark is energy_spectrum:
        loaded = result(0.3, 0.1)
    else:
        loaded = json.loads((RESULTS / "attention_analysis.json").read_text())
    assert benchmark.section(loaded) == benchmark.section(loaded)
    drawn = benchmark.figure(loaded)
    assert all(axes.has_data() for axes in drawn.axes)
    plt.close(drawn)


def test_precision_pays_only_where_the_interval_says_so():
    swing = [1, 2, 1, 2]
    kls = {
        "all at 3 bits": [0.02, 0.02, 0.02, 0.02],
        "half at 4, others at 2: by past attention": [0.005 * factor for factor in swing],
        "values of half at 4, of others at 2: by past attention": [0.014 * factor for factor in swing],
        "all at 4 bits": [0.005, 0.005, 0.005, 0.005],
        "third at 8, others at 2: by past attention": [0.05 * factor for factor in swing],
    }
    samples = [{"case": case, "text": i, "kl": kl} for case, row in kls.items() for i, kl in enumerate(row)]
    rows = attention_analysis.pays(samples)
    pays, nothing, costs = attention_analysis.answer(rows).split("bits. ")
    assert "pays: 0.35 (0.25 to 0.50) times the KL of all at 3 " in pays
    assert "changes nothing for sure: 0.99 (0.70 to 1.40)" in nothing
    assert "costs: 14.14 (10.00 to 20.00) times the KL of all at 4 bits." in costs
    assert rows[1]["p"] == 2 / 2**4

"""Experiments that are one evaluation: what their sections say of small and of sure differences."""

import pytest

from benchmarks import evaluations
from benchmarks.experiments import needle, ruler
from mlxkv.evaluate.statistics import summarise


def result(samples, score="digits_first"):
    """A result of `samples` samples: as good as the whole cache, and always worse."""
    scores = {"whole": 1.0, "as-good": 1.0, "worse": 0.2}
    records = [
        {
            "variant": name, score: value, "found": value == 1, "log_probability": -1.0, "ratio": 4.0, "seed": i % 2,
            "length": 64 * (1 + i % 2), "depth": 0.5, "group": f"task-{i % 2}",
        }
        for name, value in scores.items() for i in range(samples)
    ]  # fmt: skip
    columns = (score, "found", "log_probability")
    config = {"seeds": 2, "options": {"lengths": [64, 128], "depths": [0.5]}}
    return {"config": config, "summary": summarise(records, columns), "samples": records}


def test_a_sure_difference_is_named_and_others_are_too():
    said = evaluations.verdict(result(10), "digits_first")
    assert said == "Worse than the untouched cache beyond chance: `worse`. No sure difference: `as-good`."


def test_so_few_samples_that_nothing_can_be_sure_say_so():
    said = evaluations.verdict(result(5), "digits_first")
    assert "5 samples are too few" in said
    assert "p cannot be below 0.12" in said  # two comparisons, each at least 2 of 32
    assert "`worse`" in said


def test_a_table_has_bytes_scores_and_changes_but_none_for_the_first():
    lines = needle.section(result(10)).splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ") for line in lines if line.startswith("| `")}
    assert rows["| `whole`"][1:3] == ["0.25", "1 ± 0"]
    assert rows["| `whole`"][-2].strip() == ""
    assert "-0.8 (-0.8 to -0.8)" in rows["| `worse`"]
    assert float(rows["| `worse`"][-1].strip(" |")) == pytest.approx(2 * 2 / 2**10, rel=0.1)


def test_the_heatmap_has_a_pane_for_each_cache_with_means_by_place():
    samples = result(10)["samples"]
    samples[2]["digits_first"] = 0.0  # of whole, length 64
    places = needle.by_place(samples)
    made = needle.figure({**result(10), "summary": [*result(10)["summary"], *places]})
    panes = [axes for axes in made.axes if axes.images]
    assert [axes.get_title() for axes in panes] == ["whole", "as-good", "worse"]
    assert panes[0].images[0].get_array().tolist() == [[0.8, 1.0]]
    assert places[0] | {"samples": 5, "group": "64 tokens, 50 %"} == places[0]


def test_means_by_place_are_no_rows_of_the_table():
    found = result(10)
    found["summary"] += needle.by_place(found["samples"])
    assert needle.section(found) == needle.section(result(10))


def test_the_smallest_that_lost_no_digit_are_named_live_and_filed():
    scores = {
        "whole": (1, 2.0),
        "int8": (1, 1.9),
        "smartkv-0.3": (0.99, 3.5),
        "kvtc-16": (1, 4.0),
        "kvtc-rd-22": (1, 25.0),
    }
    rows = [{"variant": name, "digits_first": score, "ratio": ratio} for name, (score, ratio) in scores.items()]
    said = needle.smallest({"summary": rows})
    assert said.endswith(
        "of live caches `int8` in 0.53 of float16's bytes; of files `kvtc-rd-22` in 0.04 of float16's bytes."
    )
    assert needle.smallest({"summary": rows[:1]}).endswith("first: none.")


def test_tasks_stand_in_a_table_of_their_own():
    text = ruler.section(result(10, "score"))
    assert "| task-0 | 1.00 | 1.00 | 0.20 |" in text


def test_a_verdict_corrects_for_the_rows_and_takes_no_gain_for_a_loss():
    found = [("a", 0.03, -1), ("b", 0.04, -1), ("gain", 1e-4, 1)]
    rows = [{"variant": "whole", "samples": 20}]
    rows += [{"variant": name, "s_p": p, "s_change": change} for name, p, change in found]
    assert evaluations.verdict({"summary": rows}, "s") == (
        "Worse than the untouched cache beyond chance: none. Better: `gain`. No sure difference: `a`, `b`."
    )


def test_an_outcome_is_of_every_seed(monkeypatch):
    def ran(*given, seeds=1, **named):
        return {"samples": [], "summary": [], "seeds": seeds}

    monkeypatch.setattr(evaluations.lm, "load", lambda name: (None, None))
    monkeypatch.setattr(evaluations, "run", ran)
    assert evaluations.outcome("needle", ["int4"], None, seeds=3).config["seeds"] == 3

"""RULER on a model: what a record says, and that a damaged cache scores worse than an untouched one."""

import json
from dataclasses import replace

import pytest
from conftest import tiny_model
from damage import shuffled, zeroed
from ruler_checks import Words, sample

from mlxkv.errors import InputError
from mlxkv.evaluate import variants as variants
from mlxkv.evaluate.runner import draw_samples, run
from mlxkv.evaluate.sources import Sources
from mlxkv.evaluate.tasks import ruler
from mlxkv.evaluate.tasks.ruler.samples import samples, write_rows


def test_every_sample_is_asked_of_every_variant_and_of_the_untouched_cache():
    asked = [variants.live_variant("full"), variants.live_variant("sliding-window", recent=16)]
    options = ruler.RulerOptions(("fwe", "qa_1"), (300,), samples=2)
    records = run("ruler", tiny_model("llama"), Words(), asked, options)["samples"]
    names = ["whole", "full", "sliding-window (recent=16)"]
    expected = [(task, index, name) for task in options.tasks for index in range(2) for name in names]
    assert [(record["task"], record["index"], record["variant"]) for record in records] == expected
    assert json.loads(json.dumps(records)) == records
    made = sample("qa_1", 300, index=1)
    last = records[-1]
    assert last["outputs"] == list(made.answers)
    assert last["prompt_tokens"] == made.length - 32
    assert (last["length"], last["seed"], last["text"], last["group"]) == (300, 0, "built-in", "qa_1")
    assert records[0]["text"] is None
    for whole, full, window in zip(records[::3], records[1::3], records[2::3]):
        assert full["answer"] == whole["answer"]
        assert window["answer"] != whole["answer"]


def test_seeds_draw_other_samples():
    drawn = draw_samples(ruler.Ruler(ruler.RulerOptions(("fwe",), (300,), samples=1)), Words(), seeds=2)
    assert [unit.key["seed"] for unit in drawn] == [0, 1]
    assert [sample("fwe", 300, seed=seed).context for seed in (0, 1)] == [
        unit.measure.args[1].context for unit in drawn
    ]


def test_lengths_are_summarised_apart():
    one = draw_samples(ruler.Ruler(ruler.RulerOptions(("fwe",), (300,), samples=1)), Words())
    two = draw_samples(ruler.Ruler(ruler.RulerOptions(("fwe",), (300, 400), samples=1)), Words())
    assert [unit.group for unit in one] == ["fwe"]
    assert [unit.group for unit in two] == ["fwe 300", "fwe 400"]


def test_rows_that_ruler_wrote_are_asked_in_place_of_made_ones(tmp_path):
    made = [sample("vt", 900, index=index) for index in range(2)]
    (tmp_path / "vt").mkdir()
    write_rows(tmp_path / "vt" / "validation.jsonl", made)
    drawn = draw_samples(ruler.Ruler(ruler.RulerOptions(("vt",), rows=tmp_path)), Words(), seeds=3)
    assert [unit.measure.args[1] for unit in drawn] == made
    with pytest.raises(InputError, match=r"cannot read .*fwe.validation\.jsonl"):
        draw_samples(ruler.Ruler(ruler.RulerOptions(("vt", "fwe"), rows=tmp_path)), Words())
    with pytest.raises(InputError, match="rows are asked as they are"):
        ruler.RulerOptions(rows=tmp_path, squad=tmp_path)


def test_mistakes_show_before_the_model_runs():
    for tasks in (("fwe", "niah"), ()):
        with pytest.raises(InputError, match=r"unknown RULER tasks (niah|\(none\));"):
            ruler.RulerOptions(tasks)
    with pytest.raises(InputError, match="vt: a length of 300 tokens is too short"):
        ruler.Ruler(ruler.RulerOptions(("fwe", "vt"), (300,))).samples(Words(), 0)


def test_a_damaged_cache_scores_worse(smollm2):
    model, tokenizer = smollm2
    task = replace(ruler.TASKS["niah_single_1"], max_tokens=8)
    (row,) = samples(task, "niah_single_1", tokenizer, 130, 1, 0, Sources())
    compared = [variants.baseline(), variants.live_variant("full"), shuffled(), zeroed()]
    assert [record["score"] for record in ruler.ask_sample(task, row, model, tokenizer, compared)] == [1, 1, 0, 0]


def test_as_many_tokens_are_generated_as_published_and_the_question_is_not_held():
    options = ruler.RulerOptions(("fwe", "qa_1"), (300,), samples=1)
    for found in run("ruler", tiny_model("llama"), Words(), [], options)["samples"]:
        made = sample(found["task"], 300)
        assert len(found["answer"].split()) == ruler.TASKS[found["task"]].max_tokens
        assert found["tokens"] == len(Words().encode(made.context))

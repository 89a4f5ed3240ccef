"""RULER on a model: what a record says, and that a damaged cache scores worse than an untouched one."""

import json
from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import tiny_model
from ruler_checks import Words, sample

from mlxkv.errors import InputError
from mlxkv.evaluate import ruler, variants
from mlxkv.evaluate.ruler.samples import samples
from mlxkv.evaluate.ruler.sources import Sources


def test_every_sample_is_asked_of_every_variant_and_of_the_untouched_cache():
    done = []
    asked = [variants.live("full"), variants.live("sliding-window", window=16)]
    tasks = ["fwe", "qa_1"]
    records = ruler.evaluate(
        tiny_model("llama"), Words(), asked, tasks, length=300, count=2, seed=5, progress=done.append
    )
    names = ["whole", "full", "sliding-window (window=16)"]
    expected = [(task, index, name) for task in tasks for index in range(2) for name in names]
    assert [(record["task"], record["index"], record["variant"]) for record in records] == expected
    assert done == [1] * len(expected)
    assert json.loads(json.dumps(records)) == records
    made = sample("qa_1", 300, seed=5, index=1)
    last = records[-1]
    assert last["outputs"] == list(made.answers)
    assert last["tokens"] == made.length - 32
    assert (last["length"], last["seed"], last["text"]) == (300, 5, "built-in")
    assert records[0]["text"] is None
    for whole, full, window in zip(records[::3], records[1::3], records[2::3]):
        assert full["answer"] == whole["answer"]
        assert window["answer"] != whole["answer"]


def test_the_untouched_cache_is_asked_once():
    task = replace(ruler.TASKS["fwe"], tokens=2)
    rows = samples(task, Words(), 300, 1, 0, Sources())
    records = list(ruler.ask(tiny_model("llama"), Words(), [variants.whole()], task, rows))
    assert [record["variant"] for record in records] == ["whole"]


def test_mistakes_show_before_the_model_runs():
    with pytest.raises(InputError, match="unknown RULER tasks niah;"):
        ruler.evaluate(None, Words(), [], ["fwe", "niah"], length=300, count=1)
    with pytest.raises(InputError, match="too short"):
        ruler.evaluate(None, Words(), [], ["fwe", "vt"], length=300, count=1)


def test_a_damaged_cache_scores_worse(smollm2):
    model, tokenizer = smollm2
    task = replace(ruler.TASKS["niah_single_1"], tokens=10)
    rows = list(samples(task, tokenizer, 160, 1, 0, Sources()))

    def hold(model, tokens):
        cache = variants.whole().hold(model, tokens)
        for entry in cache:
            order = mx.random.permutation(entry.offset, key=mx.random.key(0))
            entry.keys[..., : entry.offset, :] = entry.keys[..., order, :]
        return cache

    whole, shuffled = ruler.ask(model, tokenizer, [variants.Variant("shuffled keys", hold)], task, rows)
    assert (whole["score"], shuffled["score"]) == (1, 0)

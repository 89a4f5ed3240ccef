"""Batches of live caches: each request gives what it gives alone, whatever the others do."""

import copy
import os
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from batch_checks import KINDS, Storm
from conftest import tiny_model, tiny_tokens
from live_checks import METHODS, small
from mlx_lm.generate import BatchGenerator, batch_generate, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from zoo.build import build

from mlxkv import load_cache, save_cache
from mlxkv.errors import InputError, MismatchError, UnsupportedError
from mlxkv.live import LayerCache, make_cache, trial
from mlxkv.live.base import check_consistent

STEPS = int(
    os.environ.get("BATCH_STEPS", "6")
)  # of each method and kind of layer; CONTRIBUTING.md has a campaign of thousands
SEED = os.environ.get("BATCH_SEED", "")  # any text, for other steps than the last time
STEP_SIZE = 16
MODELS = {"llama": tiny_model, "gemma3_text": build, "glm4_moe_lite": tiny_model, "lfm2": tiny_model}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_requests_that_join_and_leave_are_what_they_are_alone(method, kind):
    try:
        storm = Storm(kind, method, seed=f"{method}, {kind}, {STEPS}{SEED}")
    except UnsupportedError as error:
        pytest.skip(str(error))
    for _ in range(STEPS):
        storm.step()
    storm.finish()


# mlx-lm's generators

PROMPTS = [tiny_tokens(length, vocabulary=60, seed=length) for length in (3, 40, 1, 70)]


def alone(model, prompt, cache, count):
    steps = generate_step(mx.array(prompt), model, prompt_cache=cache, max_tokens=count, prefill_step_size=STEP_SIZE)
    return [(int(token), np.array(logprobs)) for token, logprobs in steps]


def batched(model, make, count, later=2):
    """Tokens and logprobs of all prompts, of which the last join while the others are answered; their caches at the end."""
    generator = BatchGenerator(model, max_tokens=count, prefill_batch_size=3, prefill_step_size=STEP_SIZE)
    found, ended, calls = {}, {}, 0
    generator.insert(PROMPTS[:-later], caches=[make() for _ in PROMPTS[:-later]])
    while True:
        prompts, answers = generator.next()
        for each in answers:
            found.setdefault(each.uid, []).append((each.token, np.array(each.logprobs)))
            if each.finish_reason:
                ended[each.uid] = each.prompt_cache, each.all_tokens
        calls += 1
        if calls == 3:
            generator.insert(PROMPTS[-later:], caches=[make() for _ in PROMPTS[-later:]])
        if not prompts and not answers:
            generator.close()
            return [found[uid] for uid in sorted(found)], [ended[uid] for uid in sorted(found)]


def agree(one, other, close=5e-3):
    """Logprobs agree up to the first token that differs, which can only be one of two that are as likely."""
    for (token, ours), (expected, theirs) in zip(one, other, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=close)
        if token != expected:
            assert abs(theirs[token] - theirs[expected]) < close
            return


@pytest.mark.parametrize(
    ("method", "architecture"),
    [("int8", name) for name in MODELS] + [("mp-kvm", "glm4_moe_lite")],
)
def test_a_generator_of_mlx_lm_answers_each_request_as_alone(method, architecture):
    model, count = MODELS[architecture](architecture), 3
    settings = small(method)

    def make():
        return make_cache(model, method, **settings)

    answers, ended = batched(model, make, count)
    for prompt, answer, (cache, tokens) in zip(PROMPTS, answers, ended):
        agree(answer, alone(model, prompt, make(), count))
        check_consistent(cache)
        assert all(each.offset == len(tokens) for each in cache if isinstance(each, LayerCache))


def test_batch_generate_takes_caches_and_leaves_them_as_they_are(tmp_path):
    model = tiny_model("llama")
    tokenizer = SimpleNamespace(eos_token_ids=[], decode=str)
    caches = [make_cache(model, "int8") for _ in PROMPTS]
    model(mx.array([tiny_tokens(90)]), cache=caches[0])
    before = [copy.deepcopy(cache) for cache in caches]
    found = batch_generate(
        model, tokenizer, PROMPTS, caches, max_tokens=4, return_prompt_caches=True, return_token_ids=True
    )
    assert [each[0].offset for each in caches] == [90, 0, 0, 0]
    for prompt, cache, tokens, ended in zip(PROMPTS, before, found.token_ids, found.caches):
        assert tokens == [token for token, _ in alone(model, prompt, cache, 4)]
        save_cache(tmp_path / "a", model, ended)
        assert load_cache(tmp_path / "a", model)[0].offset == ended[0].offset
        ended[0].trim(1)
        with pytest.raises(MismatchError, match="interrupted"):
            model(mx.array([[1]]), cache=ended)


# What is refused


def live_batch(method="int8", offsets=(5, 2), architecture="llama"):
    model = tiny_model(architecture)
    caches = [make_cache(model, method, **small(method)) for _ in offsets]
    for cache, offset in zip(caches, offsets):
        if offset:
            mx.eval(model(mx.array([tiny_tokens(offset)]), cache=cache))
    return model, caches, [rows[0].merge(rows) for rows in zip(*caches)]


def test_a_call_that_was_interrupted_is_refused_afterwards():
    model, _, batch = live_batch()

    def stop(*_):
        raise KeyboardInterrupt

    batch[1].update_and_fetch = stop
    with pytest.raises(KeyboardInterrupt):
        model(mx.array([[1], [2]]), cache=batch)
    del batch[1].update_and_fetch
    with pytest.raises(MismatchError, match="interrupted"):
        model(mx.array([[1], [2]]), cache=batch)
    with pytest.raises(MismatchError, match="interrupted"):
        model(mx.array([[1]]), cache=[each.extract(0) for each in batch])


def test_a_chunk_that_was_not_attended_is_refused_afterwards():
    _, _, batch = live_batch()
    keys = mx.zeros((2, batch[0].rows[0].slots[0].heads, 1, 16))
    batch[0].update_and_fetch(keys, keys)
    for ask in (
        lambda: batch[0].update_and_fetch(keys, keys),
        lambda: batch[0].extract(0),
        lambda: batch[0].filter([0]),
        lambda: batch[0].trim(1),
        lambda: batch[0].extend(batch[0]),
    ):
        with pytest.raises(UnsupportedError, match="not attended"):
            ask()


def test_what_cannot_be_in_one_batch_is_refused_before_it_starts():
    model, caches, batch = live_batch()
    first = caches[0][0]
    other = make_cache(tiny_model("qwen3", num_hidden_layers=2), "int8")[0]
    texts = make_cache(model, "int8")
    model(mx.array([[1], [2]]), cache=texts)
    for rows, words in (
        ([first, KVCache()], "make_cache"),
        ([first, caches[1][1]], "different layers"),
        ([first, other], "different layers or models"),
        ([first, texts[0]], "2 texts"),
    ):
        with pytest.raises(MismatchError, match=words):
            first.merge(rows)
    with pytest.raises(MismatchError, match="2 texts, the call has 3"):
        batch[0].update_and_fetch(*[mx.zeros((3, 2, 1, 16))] * 2)
    with pytest.raises(MismatchError, match="make_cache"):
        batch[0].extend(KVCache.merge([KVCache()]))
    with pytest.raises(InputError, match="lengths"):
        batch[0].prepare(right_padding=[1, 0])
    with pytest.raises(InputError, match="left"):
        batch[0].prepare(left_padding=[1, 0])
    with pytest.raises(InputError, match="2 rows"):
        batch[0].prepare(lengths=[1], right_padding=[0])
    with pytest.raises(InputError, match="0 or more"):
        batch[0].prepare(lengths=[4, -1], right_padding=[0, 5])


def test_a_row_that_cannot_take_tokens_back_keeps_the_others_from_it():
    _, _, batch = live_batch("streaming-llm", offsets=(3, 200))
    assert not batch[0].is_trimmable()
    with pytest.raises(UnsupportedError, match="cannot take 2"):
        batch[0].trim(2)
    assert batch[0].offset.tolist() == [3, 200]


def test_a_batch_can_be_extended_by_itself_and_be_empty():
    model, _, batch = live_batch(offsets=(5, 0))
    for each in batch:
        each.extend(each)
    logits = model(mx.array([[1], [2], [1], [2]]), cache=batch)
    np.testing.assert_allclose(logits[:2], logits[2:], atol=1e-5)
    assert batch[0].offset.tolist() == [6, 1, 6, 1]
    for each in batch:
        each.filter([])
        assert (each.trim(1), each.nbytes, each.size(), each.offset.tolist()) == (0, 0, 0, [])
    _, _, other = live_batch(offsets=(3,))
    for each, more in zip(batch, other):
        each.extend(more)
    model(mx.array([[1]]), cache=batch)
    assert batch[0].offset.tolist() == [4]


def test_padding_on_the_left_is_skipped():
    lengths = (9, 4, 0)
    model, _, batch = live_batch(offsets=(0, 0, 0))
    texts = [tiny_tokens(length, seed=length) for length in lengths]
    for each in batch:
        each.prepare(left_padding=[9 - length for length in lengths])
    rows = mx.array([[0] * (9 - len(text)) + text for text in texts])
    for start in (0, 6):
        model(rows[:, start : start + 6], cache=batch)
    logits = model(mx.array([[7]] * 3), cache=batch)
    for i, text in enumerate(texts):
        expected = model(mx.array([[*text, 7]]), cache=make_cache(model, "int8"))[0, -1:]
        np.testing.assert_allclose(logits[i], expected, atol=5e-3)
    assert batch[0].offset.tolist() == [10, 5, 1]


@pytest.mark.parametrize("architecture", ["gemma2", "nemotron_h", "afm7", "gpt_bigcode", "llama4"])
def test_models_that_do_not_take_batches_are_told_before_they_start(architecture):
    model = build(architecture)
    caches = [make_cache(model, "int8") for _ in range(2)]
    live = next(i for i, each in enumerate(caches[0]) if isinstance(each, LayerCache))
    with pytest.raises(UnsupportedError, match=f"{architecture} model does not take batches"):
        caches[0][live].merge([each[live] for each in caches])


def test_a_trial_is_made_once_for_each_model(monkeypatch):
    runs = []
    monkeypatch.setattr(trial, "_difference", lambda model, layers: runs.append(model) or 0.0)
    for _ in range(2):
        live_batch()
    model = tiny_model("llama")
    caches = make_cache(model, "int8")
    for each in (*caches, *caches):
        each.merge([each])
    assert len(runs) == 3
    assert runs[2] is model
    assert all(hasattr(each, "merge") for each in caches + make_prompt_cache(model))

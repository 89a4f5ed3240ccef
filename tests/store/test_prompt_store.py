"""Prompts that were stored come back: bit for bit or close, from where caches can be cut, for every kind of cache."""

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from stored import assert_same, computed, run, stored
from zoo.build import build, tokens

from mlxkv import Store, make_cache
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.base import LayerCache
from mlxkv.store.codings import AGAIN_TOKENS

KINDS = ["gemma3_text", "deepseek_v3", "longcat_flash", "deepseek_v32", "qwen3_next", "baichuan_m1"]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", limit=10**9) as made:
        yield made


def check_exact(store, model, ids, length):
    prompts = store.for_model(model, exact=True)
    cache = stored(prompts, model, ids[:length])
    assert prompts.match(ids) == length
    fetched = prompts.fetch(ids)
    assert fetched.length == length
    assert_same(fetched.cache, cache)
    assert mx.array_equal(run(model, fetched.cache, ids[length:], 1), run(model, cache, ids[length:], 1))
    found = prompts.statistics()
    assert (found["hits"], found["misses"], found["errors"], found["skipped"]) == (1, 0, 0, 0)
    assert found["bytes_read"] == found["bytes_written"] == found["store"]["stored"] > 0
    assert found["tokens_read"] == found["tokens_written"] == length


def test_an_exact_prompt_comes_back_bit_for_bit(store, tiny):
    check_exact(store, tiny, tiny_tokens(156), 150)


@pytest.mark.parametrize("name", KINDS)
def test_an_exact_prompt_comes_back_bit_for_bit_in_caches_of_every_kind(store, name):
    check_exact(store, build(name), tokens(name, 156), 150)


def test_an_exact_prompt_of_several_blocks_comes_back_bit_for_bit(store):
    check_exact(store, tiny_model("llama"), tiny_tokens(606), 600)


def test_bfloat16_comes_back_bit_for_bit(store):
    model = tiny_model("lfm2")
    model.set_dtype(mx.bfloat16)
    check_exact(store, model, tiny_tokens(106), 100)


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite"])
def test_the_newest_tokens_of_a_coded_prompt_are_computed_again(store, name):
    model, ids = tiny_model(name), tiny_tokens(606)
    prompts = store.for_model(model, quality=70)
    cache = stored(prompts, model, ids[:600])
    fetched = prompts.fetch(ids)
    assert fetched.length == 606 - AGAIN_TOKENS
    close = run(model, fetched.cache, ids[fetched.length :], AGAIN_TOKENS)[-6:]
    assert mx.allclose(close, run(model, cache, ids[600:], 6), atol=0.5)


@pytest.mark.parametrize("name", ["lfm2", "gemma3_text", "qwen3_next"])
def test_a_coded_prompt_that_cannot_be_cut_comes_back_whole(store, name):
    model, ids = build(name), tokens(name, 156)
    prompts = store.for_model(model)
    cache = stored(prompts, model, ids[:150])
    fetched = prompts.fetch(ids)
    assert fetched.length == 150
    assert mx.allclose(run(model, fetched.cache, ids[150:], 6), run(model, cache, ids[150:], 6), atol=0.5)


@pytest.mark.parametrize(("name", "exact"), [("gpt2", False), ("gemma3_text", True), ("lfm2", False)])
def test_a_prompt_that_is_stored_whole_leaves_a_token_to_compute(store, name, exact):
    model, ids = build(name), tokens(name, 150)
    prompts = store.for_model(model, exact=exact)
    stored(prompts, model, ids[:120])
    stored(prompts, model, ids)
    fetched = prompts.fetch(ids)
    assert 150 - AGAIN_TOKENS <= fetched.length < 150
    assert fetched.length >= 118 or not exact
    run(model, fetched.cache, ids[fetched.length :])


def test_a_prompt_goes_on_from_the_last_place_before_an_edit(store):
    model, ids = tiny_model("llama"), tiny_tokens(1200)
    prompts = store.for_model(model, quality=70)
    stored(prompts, model, ids, cuts=[700])
    other = [(token + 1) % 97 for token in ids]
    # Multiples of 512, the place where a prompt ended, and nothing between.
    expected = {511: 0, 512: 512, 699: 512, 700: 700, 1023: 700, 1024: 1024, 1200: 1200 - AGAIN_TOKENS}
    assert {at: prompts.match(ids[:at] + other[at:]) for at in expected} == expected


@pytest.mark.parametrize(("end", "entered"), [(63, 0), (500, 448), (512, 512), (570, 512), (1020, 960)])
def test_texts_end_where_blocks_are_neither_short_nor_leave_short_ones(store, end, entered):
    model, ids = tiny_model("llama"), tiny_tokens(1100)
    prompts = store.for_model(model, quality=70)
    stored(prompts, model, ids[:end])
    assert prompts.match(ids) == entered
    assert [entry.tokens for entry in store.blocks.entries()] == ([entered] if entered else [])
    assert prompts.statistics()["skipped"] == (not entered)


def test_a_growing_conversation_and_its_branches_write_their_own_tokens_alone(store):
    model, ids = tiny_model("llama"), tiny_tokens(1400)
    prompts = store.for_model(model)
    for end in (100, 500, 900, 1300):
        stored(prompts, model, ids[:end])
    before = prompts.statistics()
    assert before["store"]["written"] == before["store"]["stored"] == before["bytes_written"]
    assert before["tokens_written"] == 1300
    branch = ids[:1000] + tiny_tokens(200, seed=5)
    stored(prompts, model, branch)
    after = prompts.statistics()
    assert after["tokens_written"] - before["tokens_written"] == 1200 - 900  # from the last place that both share
    assert prompts.match([*branch, *range(AGAIN_TOKENS)]) == 1200
    assert prompts.match([*ids, *range(AGAIN_TOKENS)]) == 1300


def test_hybrids_go_on_from_every_turn_and_keep_a_state_of_each(store):
    model, ids = tiny_model("lfm2"), tiny_tokens(700)
    prompts = store.for_model(model, quality=70)
    for end in (90, 101, 600, 640):
        stored(prompts, model, ids[:end])
    assert {at: prompts.match(ids[:at]) for at in (90, 91, 102, 513, 601, 700)} == {
        90: 0, 91: 90, 102: 101, 513: 101, 601: 600, 700: 640,
    }  # fmt: skip
    assert len(list((store.blocks.folder.path / "states").rglob("*.mlxkv"))) == 4


def test_models_qualities_and_grades_do_not_see_each_other(store):
    model, ids = tiny_model("llama"), tiny_tokens(200)
    stored(store.for_model(model), model, ids)
    assert store.for_model(model, quality=39.5).match(ids) > 0
    assert store.for_model(model, quality=39.25).match(ids) == 0
    assert store.for_model(model, exact=True).match(ids) == 0
    assert store.for_model(model, method="int8").match(ids) == 0
    assert store.for_model(model, method="full").match(ids) > 0
    assert store.for_model(tiny_model("llama", seed=1)).match(ids) == 0


@pytest.mark.parametrize(
    ("name", "preset"),
    [("llama", "full"), ("llama", "int4"), ("lfm2", "kivi"), ("gemma3_text", "int8")],
)
def test_live_caches_that_keep_every_token_come_back_as_live_caches(store, name, preset):
    model, ids = build(name), tokens(name, 276)
    prompts = store.for_model(model, exact=True, method=preset)
    cache = make_cache(model, preset)
    run(model, cache, ids[:270])
    prompts.insert(ids[:270], cache)
    assert prompts.flush(60)
    fetched = prompts.fetch(ids)
    assert fetched.length == 270
    assert [type(entry) for entry in fetched.cache] == [type(entry) for entry in cache]
    assert any(isinstance(entry, LayerCache) for entry in fetched.cache)
    close = mx.abs(run(model, fetched.cache, ids[270:], 6) - run(model, cache, ids[270:], 6)).max()
    assert close < {"full": 1e-6, "int8": 0.2}.get(preset, 2.0)


@pytest.mark.parametrize("preset", ["h2o", "streaming-llm", "smartkv"])
def test_live_caches_that_give_tokens_up_are_refused_with_what_to_do(store, preset):
    with pytest.raises(UnsupportedError, match="full, int8, int4 and kivi"):
        store.for_model(tiny_model("llama"), method=preset)


def test_a_model_whose_caches_cannot_be_copied_is_refused_with_what_to_do(store):
    with pytest.raises(UnsupportedError, match=r"ChunkedKVCache.*--no-store"):
        store.for_model(build("llama4"))


@pytest.mark.parametrize(
    "options", [{"quality": 101}, {"quality": -1}, {"quality": True}, {"quality": 38, "exact": True}]
)
def test_qualities_that_do_not_exist_are_refused(store, options):
    with pytest.raises(InputError):
        store.for_model(tiny_model("llama"), **options)


def test_places_that_a_window_has_left_are_not_entered(store):
    model, ids = build("gemma3_text"), tokens("gemma3_text", 150)
    prompts = store.for_model(model)
    stored(prompts, model, ids, cuts=[70, 145])
    assert [entry.tokens for entry in store.blocks.entries()] == [150]
    assert prompts.match([*ids, 1]) == 150
    assert prompts.statistics()["skipped"] == 0


def test_tokens_and_cache_that_disagree_are_stored_as_far_as_both_go(store):
    model, ids = tiny_model("llama"), tiny_tokens(200)
    prompts = store.for_model(model, exact=True)
    prompts.insert(ids, computed(model, ids[:150]))  # a token that was given out and never fed
    prompts.insert([*ids[:99], 1], computed(model, [*ids[:99], 1, *ids[100:]]))
    assert prompts.flush(60)
    assert prompts.match([*ids, 1]) == 150
    assert prompts.match([*ids[:99], 1, 2]) == 100


def _quantized(model, ids):
    return [QuantizedKVCache() for _ in model.layers]


def _interrupted(model, ids):
    cache = computed(model, ids)
    cache[0].trim(1)
    return cache


NOT_STORED = {
    "with the cache of a draft model": lambda model, ids: 2 * computed(model, ids),
    "quantized by mlx-lm": _quantized,
    "interrupted between layers": _interrupted,
    "empty": lambda model, ids: make_prompt_cache(model),
    "of two texts": lambda model, ids: _two(model, ids),
    "of another type": lambda model, ids: computed(_half(model), ids),
}


def _two(model, ids):
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([ids, ids]), cache=cache))
    return cache


def _half(model):
    other = tiny_model("llama")
    other.set_dtype(mx.float16)
    return other


@pytest.mark.parametrize("make", NOT_STORED.values(), ids=NOT_STORED)
def test_what_cannot_be_stored_is_counted_and_logged_once(store, make, caplog):
    model, ids = tiny_model("llama"), tiny_tokens(100)
    prompts = store.for_model(model)
    cache = make(model, ids)
    for _ in range(3):
        prompts.insert(ids, cache)
    assert prompts.flush(60)
    assert prompts.statistics()["skipped"] == 3
    assert len(caplog.records) == 1
    assert prompts.fetch([*ids, 1]) is None


def test_windows_of_more_tokens_than_were_given_are_not_stored(store):
    model, ids = build("gemma3_text"), tokens("gemma3_text", 100)
    prompts = store.for_model(model)
    prompts.insert(ids[:90], computed(model, ids))
    assert prompts.statistics()["skipped"] == 1


@pytest.mark.parametrize("ids", [[], [2**40] * 100, [-1 - 2**60] * 100, [0.5] * 100, [[1] * 100]], ids=str)
def test_tokens_that_are_no_int32_are_neither_stored_nor_found(store, ids):
    model = tiny_model("llama")
    prompts = store.for_model(model)
    prompts.insert(ids, computed(model, tiny_tokens(100)))
    assert prompts.statistics()["skipped"] == 1
    assert prompts.match(ids) == 0
    assert prompts.fetch(ids) is None


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2"])
def test_caches_taken_out_of_a_batch_come_back_bit_for_bit(store, name):
    model = build(name)
    prompts = store.for_model(model, exact=True)
    batch = BatchGenerator(model, prefill_step_size=64)
    texts = [tokens(name, 80), tokens(name, 150, seed=4)]
    batch.insert_segments([[text[:70], text[70:]] for text in texts], max_tokens=[3, 5])
    ended = []
    while len(ended) < 2:
        processed, generated = batch.next()
        at_ends = [each.uid for each in processed if each.end_of_segment and not each.end_of_prompt]
        for cache, ids in batch.extract_cache(at_ends).values():
            prompts.insert(ids, cache, "system")
        for each in generated:
            if each.finish_reason:
                prompts.insert(each.all_tokens, each.prompt_cache)
                ended.append((list(each.all_tokens), each.prompt_cache))
    assert prompts.flush(60)
    for ids, cache in ended:
        fetched = prompts.fetch([*ids, 1])
        assert fetched.length >= len(ids) - 63
        if fetched.length == len(ids):
            assert_same(fetched.cache, cache)
    assert prompts.statistics()["skipped"] == prompts.statistics()["errors"] == 0


def test_a_snapshot_keeps_what_later_tokens_overwrite(store):
    model, ids = tiny_model("llama"), tiny_tokens(300)
    gate = store._writer
    prompts = store.for_model(model, exact=True)
    cache = computed(model, ids[:256])
    expected = computed(model, ids[:256])
    with gate._changed:  # the writer waits
        prompts.insert(ids[:256], cache)
        cache[0].trim(100)
        run(model, cache, tiny_tokens(50, seed=9), 1)
    assert prompts.flush(60)
    assert_same(prompts.fetch(ids).cache, expected)


def test_the_texts_of_a_model_are_told_those_used_last_first(store):
    model, ids = tiny_model("llama"), tiny_tokens(600)
    prompts, others = store.for_model(model), store.for_model(model, quality=30)
    stored(others, model, tiny_tokens(100, seed=7))
    texts = [ids[:570], ids[:200], tiny_tokens(80, seed=8)]
    for text in texts:
        stored(prompts, model, text)
    assert [found.tolist() for found in prompts.texts()] == [texts[2], texts[1], ids[:512]]
    prompts.fetch(ids)
    store.blocks.flush()
    assert next(prompts.texts()).tolist() == ids[:512]


def test_the_store_keeps_no_model_in_memory(store):
    model = tiny_model("llama")
    prompts = store.for_model(model)
    ids = tiny_tokens(100)
    stored(prompts, model, ids)
    del model
    assert prompts.match(ids) > 0
    assert prompts.fetch(ids) is None


def test_first_tokens_of_a_coded_text_take_16_bits_where_those_hold_them(store):
    model, ids = tiny_model("llama"), tiny_tokens(100)
    cache = computed(model, ids)
    wide = [array[..., :4, :] for entry in cache for array in entry.keys_and_values()]
    prompts = store.for_model(model)
    prompts.insert(ids, cache)
    assert prompts.flush(60)
    found = [array[..., :4, :] for entry in prompts.fetch(ids).cache for array in entry.keys_and_values()]
    assert all(mx.array_equal(a, b.astype(mx.float16).astype(mx.float32)) for a, b in zip(found, wide, strict=True))
    cache[0].values = cache[0].values * 1e6
    others = store.for_model(model, quality=30)
    others.insert(ids, cache)
    assert others.flush(60)
    assert mx.array_equal(others.fetch(ids).cache[0].keys[..., :4, :], cache[0].keys[..., :4, :])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["llama", "lfm2", "glm4_moe_lite"])
def test_warming_up_stores_and_counts_nothing(store, name, exact):
    prompts = store.for_model(tiny_model(name), exact=exact)
    before = prompts.statistics()
    prompts.codings.warm(prompts.form.dtype)
    assert prompts.statistics() == before

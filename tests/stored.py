"""What tests of stored prompts share: texts run through tiny models, and caches compared."""

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import stock


def run(model, cache, ids, step=100):
    """Logits after each chunk of a text; everything is computed."""
    logits = [model(mx.array([ids[i : i + step]]), cache=cache)[0] for i in range(0, len(ids), step)]
    mx.eval(logits, [entry.state for entry in cache if entry is not None])
    return mx.concatenate(logits)


def computed(model, ids, step=100):
    """mlx-lm's cache of a text: in chunks, the last 10 tokens one by one, as in generation."""
    cache = make_prompt_cache(model)
    run(model, cache, ids[:-10], step)
    run(model, cache, ids[-10:], 1)
    return cache


def assert_same(found, expected):
    """Two prompt caches hold the same bits, in arrays of the same types, at the same places of rings."""
    for index, (one, other) in enumerate(zip(stock.entries(found), stock.entries(expected), strict=True)):
        assert type(one) is type(other)
        if one is None:
            continue
        ours, theirs = stock.state_parts(one), stock.state_parts(other)
        assert ours.keys() == theirs.keys()
        for key, part in theirs.items():
            if isinstance(part, mx.array):
                assert (ours[key].dtype, ours[key].shape) == (part.dtype, part.shape), (index, key)
                assert mx.array_equal(ours[key], part).item(), (index, key)
            else:
                assert ours[key] == part, (index, key)


def stored(prompts, model, ids, kind="assistant", **options):
    """Store what a model makes of a text, and wait for it."""
    cache = computed(model, ids)
    prompts.insert(ids, cache, kind, **options)
    assert prompts.flush(60)
    return cache

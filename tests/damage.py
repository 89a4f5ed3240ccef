"""Deliberately broken caches: an evaluation that cannot tell them from a good one measures nothing."""

import mlx.core as mx

from mlxkv.evaluate.variants import Variant, baseline


def shuffled():
    """Every value under some other token's key."""
    return _damaged("shuffled keys", lambda keys, values, order: (keys[..., order, :], values))


def zeroed():
    """Half of the tokens' keys and values are zeros."""

    def half(keys, values, order):
        kept = (order < order.size // 2)[:, None]
        return keys * kept, values * kept

    return _damaged("half zeroed", half)


def _damaged(name, change):
    def hold(model, tokens, exact=None):
        held = baseline().build(model, tokens)
        for i, entry in enumerate(held.cache):
            if hasattr(entry, "keys_and_values"):
                used = slice(0, entry.offset)
                order = mx.random.permutation(entry.offset, key=mx.random.key(i))
                entry.keys[..., used, :], entry.values[..., used, :] = change(
                    entry.keys[..., used, :], entry.values[..., used, :], order
                )
        return held

    return Variant(name, {}, hold)

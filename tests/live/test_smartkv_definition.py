"""SmartKV against its definition, written token by token and head by head over lists."""

import mlx.core as mx
import numpy as np
import pytest
from live_checks import feed, lone_cache, plain_attention, stored

from mlxkv.kernels.bits import pack, unpack
from mlxkv.live.allocation import allocate_exact
from mlxkv.live.methods._smartkv_budget import LOOK_AHEAD, TILE, TOP, bits_of, demotion_counts, layer_budget
from mlxkv.spec import CacheSpec, Slot

HEADS, DIM = 2, 32
SPEC = CacheSpec("toy", ((Slot("keys", HEADS, DIM), Slot("values", HEADS, DIM)),))
CASES = {
    "a prompt, then tokens": (0.3, [300, *[1] * 40]),
    "tokens alone": (0.5, [1] * 170),
    "chunks and tokens": (0.4, [40, 1, 1, 100, 1, 7, *[1] * 20, 60, *[1] * 20, 2]),
}


def quantized(rows, bits, by_channel=False):
    tokens, dims = (TILE, 1) if by_channel else (1, DIM)
    packed = pack(mx.array(rows.astype(np.float16))[None, None], bits, tokens, dims)
    return np.array(unpack(packed, mx.float32))[0, 0]


def as_quantized(tokens, key_bits, value_bits):
    if not tokens:
        return []
    keys, values, importance = zip(*tokens)
    rows = quantized(np.array(keys), key_bits, key_bits < 8), quantized(np.array(values), value_bits)
    return [[*each] for each in zip(*rows, importance)]


class Plain:
    """Each head's tokens as (key, value, importance) in lists: those in low bits by level, in 8 bits, and in the tail."""

    def __init__(self, budget):
        self.budget, self.seen = layer_budget(slots(), False, budget, 4), 0
        self.lower = [[[] for _ in range(TOP)] for _ in range(HEADS)]
        self.top, self.tail = ([[] for _ in range(HEADS)] for _ in range(2))

    def tokens(self, head):
        return [token for part in (*self.lower[head], self.top[head], self.tail[head]) for token in part]

    def stored(self, slot):
        return np.array([[token[slot] for token in self.tokens(head)] for head in range(HEADS)])[None]

    def take(self, queries, keys, values):
        length = keys.shape[2]
        halves = [np.array(x).astype(np.float16).astype(np.float32) for x in (keys, values)]
        own = halves if length == 1 and self.seen >= 4 else [np.array(keys), np.array(values)]
        old = [self.stored(slot) if self.seen else np.zeros((1, HEADS, 0, DIM)) for slot in (0, 1)]
        seen = [np.concatenate(pair, axis=2) for pair in zip(old, own)]
        output = plain_attention(np.array(queries), *seen, 0.3, "causal" if length > 1 else None)
        asked = min(length, 64)
        scores = 0.3 * np.array(queries)[0, :, length - asked :] @ seen[0][0].swapaxes(-1, -2)
        scores = np.where(np.tri(asked, self.seen + length, self.seen + length - asked, bool), scores, -np.inf)
        mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mass = (mass / mass.sum(axis=-1, keepdims=True)).sum(axis=1)
        self.seen += length
        for head in range(HEADS):
            self.count(head, mass[head], asked, length)
            self.tail[head] += [
                [*(half[0, head, i] for half in halves), self.new(head, i, length, mass, asked)] for i in range(length)
            ]
        self.settle()
        return output

    def count(self, head, mass, asked, length):
        for place, token in enumerate(self.tokens(head)):
            mean = mass[place] / min(len(mass) - place, asked)
            token[2] = 0.9**asked * token[2] + (1 - 0.9**asked) * mean

    def new(self, head, index, length, mass, asked):
        if self.seen - length + index < 4:
            return np.inf  # a sink
        return mass[head, index - length] / min(length - index, asked)

    def settle(self):
        counts, top, tail = [len(level) for level in self.lower[0]], len(self.top[0]), len(self.tail[0])
        if not self.budget.must_flush(counts, top, tail, 4, 16):
            return
        leaving = max(0, tail - self.budget.recent_tokens(4, 16, self.seen))
        interval, budget = self.budget.flush_interval(16, self.seen), self.budget
        room = budget.max_bytes(self.seen) - budget.used_bytes(counts, 0, tail - leaving)
        room -= budget.demotion_reserve(top + leaving, interval)
        moves = demotion_counts(
            allocate_exact, top + leaving, room, budget.spare_bytes(self.seen, counts), budget.tile_bytes,
            budget.top_token_bytes,
        )  # fmt: skip
        for head in range(HEADS):
            self.demote(head, moves, leaving)

    def demote(self, head, moves, leaving):
        new, self.tail[head] = self.tail[head][:leaving], self.tail[head][leaving:]
        older = len(self.top[head])
        in_8_bits = as_quantized(new, 8, 8)
        # A token of a prompt is quantized once, at the precision it ends at.
        source = self.top[head] + (in_8_bits if older else new)
        kept = self.top[head] + in_8_bits
        weights = [token[2] * (1.05 if place < older else 1) for place, token in enumerate(source)]
        order = [int(i) for i in np.argsort(np.float32(weights), kind="stable")]
        for level, count in enumerate(moves):
            moved, order = [source[i] for i in order[:count]], order[count:]
            if moved:
                self.lower[head][level] += as_quantized(moved, *bits_of(level, False))
        self.top[head] = [kept[i] for i in sorted(order)]


def slots():
    layer = SPEC.layers[0]
    return layer.keys, layer.values


@pytest.mark.parametrize(("budget", "sizes"), CASES.values(), ids=CASES)
def test_what_is_stored_and_attended_to_is_what_the_definition_says(budget, sizes):
    cache, plain = lone_cache("smartkv", SPEC, budget=budget), Plain(budget)
    for step, size in enumerate(sizes):
        queries, keys, values = (
            mx.random.normal((1, HEADS, size, DIM), key=mx.random.key(3 * step + i)) for i in range(3)
        )
        output = feed(cache, keys, values, 3 * queries)
        np.testing.assert_allclose(output, plain.take(3 * queries, keys, values), atol=2e-4)
    for slot in (0, 1):
        np.testing.assert_allclose(stored(cache, slot), plain.stored(slot), atol=1e-5)
    waiting = [[token[2] for token in plain.top[head] + plain.tail[head]] for head in range(HEADS)]
    np.testing.assert_allclose(cache.importance[0], waiting, rtol=1e-4)
    assert any(plain.lower[0]), "nothing was demoted"


def test_the_next_flush_is_where_asking_at_each_token_finds_it():
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.9):
        budget = layer_budget(slots(), False, share, 4)
        for _ in range(20):
            lower = (0, int(rng.integers(0, 9)) * TILE, 0, 0, 0)
            top, tail = int(rng.integers(0, 300)), int(rng.integers(4, 9))
            found = next(n for n in range(1, 9000) if budget.must_flush(lower, top, tail + n, 4, 16))
            assert budget.next_flush(lower, top, tail, 4, 16) == min(found, LOOK_AHEAD)

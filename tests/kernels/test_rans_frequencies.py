"""Histograms to tables: near the shortest code, and the same on every machine."""

import heapq
import math

import numpy as np
import pytest

from mlxkv.errors import InputError
from mlxkv.kernels.rans import TOTAL, frequencies


def greedy(counts):
    """The shortest code that 4,096 slots allow: each slot to whom it helps most."""
    table = dict.fromkeys(np.flatnonzero(counts), 1)
    queue = [(counts[symbol] * math.log(1 / 2), symbol) for symbol in table]
    heapq.heapify(queue)
    for _ in range(TOTAL - len(table)):
        _, symbol = heapq.heappop(queue)
        table[symbol] += 1
        heapq.heappush(queue, (counts[symbol] * math.log(table[symbol] / (table[symbol] + 1)), symbol))
    return table


def test_frequencies_are_near_the_shortest_code():
    random = np.random.default_rng(1)
    shares = [random.exponential(1, 256), random.exponential(1, 256) ** 9, np.eye(256)[7] + 1e-5, np.eye(256)[0]]
    counts = np.stack([np.ceil(share / share.sum() * 10**6).astype(np.int64) for share in shares])
    for row, table in zip(counts, frequencies(counts)):
        best, used = greedy(row), row > 0
        assert table.sum() == TOTAL
        assert (table[used] >= 1).all()
        assert (table[~used] == 0).all()
        ideal = -sum(row[symbol] * math.log2(f / TOTAL) for symbol, f in best.items())
        assert -(row[used] * np.log2(table[used] / TOTAL)).sum() <= ideal * 1.0001 + 1e-9


def test_ties_and_empty_histograms_go_to_the_lowest_symbols():
    table = frequencies(np.array([[1, 1, 1] + [0] * 253, [0] * 256, [0] * 255 + [2**40]]))
    assert table[0, :3].tolist() == [1366, 1365, 1365]
    assert table[1, 0] == table[2, 255] == TOTAL


@pytest.mark.parametrize("counts", [np.ones(256), np.ones((1, 255)), -np.eye(256), np.full((1, 256), 2**40)])
def test_histograms_of_another_kind_are_refused(counts):
    with pytest.raises(InputError):
        frequencies(counts)

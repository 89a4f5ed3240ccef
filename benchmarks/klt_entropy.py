"""How many bytes an entropy coder would save on `klt`'s digits: python -m benchmarks.klt_entropy [TOKENS].

Ideal arithmetic coding of each channel and bucket by its own counts, and of the same coordinates quantized uniformly with a dead
zone to the same squared error; both as shares of klt's digits, and what the counts would take. Every third layer of SmolLM2, two texts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import held
from benchmarks.experiments.low_bytes import held_out
from benchmarks.schema import MODEL
from mlxkv import lm
from mlxkv.kernels.digit_attention import DigitSlot
from mlxkv.live import live_config
from mlxkv.live.klt import coding
from mlxkv.live.klt.learning import inverse
from mlxkv.live.methods.klt import KLTCache

TEXTS, BUDGETS, EVERY = ("code-argparse", "reference-pathlib"), (0.11, 0.15, 0.2), 3
ROUNDING, SHRINKING = 0.42, 0.03  # of the quantizer with a dead zone


class Noted(KLTCache):
    """klt that keeps what it packs beside it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.noted: list[tuple[mx.array, list[mx.array]]] = []

    def _append(self, slot: DigitSlot, x: mx.array, indices: list[mx.array]) -> DigitSlot:  # type: ignore[override]
        self.noted.append((x, indices))
        return coding.append(slot, x, indices)


def entropy(symbols: np.ndarray) -> tuple[float, int]:
    """Return the bits of symbols, coded by their own counts, and how many different ones there are."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()), len(counts)


def dead_zone(z: np.ndarray, error: float) -> np.ndarray:
    """Return whole numbers for coordinates `[rows, D]`, with one step for all and a given squared error a row."""
    low, high, found = -24.0, 12.0, np.zeros_like(z)
    for _ in range(24):
        step = 2 ** ((low + high) / 2)
        found = np.sign(z) * np.floor(np.abs(z) / step + ROUNDING)
        back = np.sign(found) * (np.abs(found) - SHRINKING * (found != 0)) * step
        low, high = (low, (low + high) / 2) if ((z - back) ** 2).sum() / len(z) > error else ((low + high) / 2, high)
    return found


def buckets(slot: DigitSlot, x: mx.array, indices: list[mx.array]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield of each bucket and head the codes and their channels, `[rows, N]` digits and `[N]`, coordinates and the lost squares."""
    z = (x - mx.expand_dims(slot.mean.astype(mx.float32), 2)) @ inverse(slot.basis).swapaxes(-1, -2)
    decoded, start = coding.decoded(slot), 0
    for (codes, _, _), rows in zip(slot.buckets(), indices):
        stop, at = start + rows.shape[-1], mx.expand_dims(rows, -1)
        lost = mx.square(mx.take_along_axis(x, at, axis=2) - decoded[:, :, start:stop]).sum(axis=-1)
        digits = np.concatenate([np.array(codes) >> 2 * plane & 3 for plane in range(4)], axis=-1)[0]
        order, own = np.array(slot.order)[0], np.array(mx.take_along_axis(z, at, axis=2))[0]
        for head in range(len(digits)):
            yield digits[head], order[head, : digits.shape[-1]], own[head], np.array(lost)[0, head]
        start = stop


def measured(cache: list[Any]) -> dict[str, float]:
    """Return bits as shares of those of klt's digits."""
    total = dict.fromkeys(("digits", "coded", "counts", "dead zone", "its counts"), 0.0)
    for layer in cache[::EVERY]:
        for slot, (x, indices) in zip((layer.packed_keys, layer.packed_values), layer.noted):
            for digits, order, z, lost in buckets(slot, x, indices):
                total["digits"] += 2.0 * digits.size
                for channel in np.unique(order):
                    places = 4 ** np.arange((order == channel).sum())[::-1]
                    bits, kinds = entropy(digits[:, order == channel].astype(int) @ places)
                    total["coded"] += bits
                    total["counts"] += 8 * kinds
                for column in dead_zone(z, float(lost.mean())).T:
                    bits, kinds = entropy(column)
                    total["dead zone"] += bits
                    total["its counts"] += 8 * kinds * (kinds > 1)
    return {name: round(bits / total["digits"], 3) for name, bits in total.items()}


def main() -> None:
    """Print a line for each text and budget."""
    length = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    model, tokenizer = lm.load(MODEL)
    found = held_out(tokenizer, length)
    for text in TEXTS:
        for _, exact in held.read(model, found[text], [length]):
            for budget in BUDGETS:
                variant = held.replayed("klt", Noted, live_config("klt", budget=budget), exact)
                print(text, length, budget, measured(variant.build(model, found[text]).cache), flush=True)


if __name__ == "__main__":
    main()

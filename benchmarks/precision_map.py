"""Which tokens does SmartKV hold in how many bits? An essay with a pass key in it, token by token.

SmolLM2 holds the essay in smartkv-0.3; the bits of each token's keys and values are read off the cache, means over layers
and heads. Nothing has asked for the key yet, so its tokens are important only if the model finds them so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from benchmarks import tables
from benchmarks.held_out import MODEL
from benchmarks.schema import Outcome, Result
from mlxkv import lm
from mlxkv.evaluate.statistics import bootstrap_interval, sign_flip_test
from mlxkv.evaluate.tasks import attention, needle
from mlxkv.evaluate.tasks.ruler.sources import Sources
from mlxkv.evaluate.variants import baseline, live_variant
from mlxkv.models import cache_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 5
PRESET = "smartkv-0.3"
LENGTH, DEPTHS = 512, (0.1, 0.3, 0.5, 0.7, 0.9)
ENDS = 32  # first and last tokens that are not counted: sinks, and tokens that have not been packed yet
AROUND = 60  # tokens before and after the key that the picture shows


def run(quick: bool) -> Outcome:
    """Quick: one depth. Three seeds, each with other keys."""
    model, tokenizer = lm.load(MODEL)
    places = [(depth, seed) for depth in (DEPTHS[2:3] if quick else DEPTHS) for seed in range(3)]
    samples = []
    for depth, seed in track(places, "texts"):
        key = needle.drawn_key(LENGTH, depth, seed)
        tokens = needle.haystack(tokenizer, Sources(), LENGTH, depth, key)
        samples.append({"depth": depth, "seed": seed, **measured(model, tokenizer, tokens, key)})
    return Outcome({"model": MODEL, "preset": PRESET, "length": LENGTH, "ends": ENDS}, samples, summarise(samples))


def measured(model: Any, tokenizer: Any, tokens: list[int], key: str) -> dict[str, Any]:
    """Bits of every token, and which of them are the needle's."""
    layers = cache_spec(model).attention_layers
    exact, held = (variant.build(model, tokens).cache for variant in (baseline(), live_variant(PRESET)))
    bits = np.mean([of_tokens(held[layer], exact[layer]) for layer in layers], axis=0)
    hidden = tokenizer.encode(needle.NEEDLE.format(key), add_special_tokens=False)
    start = next(i for i in range(len(tokens)) if tokens[i : i + len(hidden)] == hidden)
    return {
        "needle": [start, start + len(hidden)],
        "bits": bits.round(3).tolist(),
        "tokens": [tokenizer.decode([token]) for token in tokens],
    }


def of_tokens(cache: Any, exact: Any) -> np.ndarray:
    """Bits of each token's keys and values in one layer, `[T]`, a mean over heads. exact: mlx-lm's cache of the same tokens."""
    widths = [(16 if k.raw else k.bits) / 2 + (16 if v.raw else v.bits) / 2 for k, v in cache.buckets()]
    of_entries = np.repeat(widths, [k.shape[-2] for k, _ in cache.buckets()])
    shares = attention.entry_shares(attention.stored_entries(cache), attention.stored_entries(exact))
    return (of_entries @ shares).mean(axis=0)


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Bits of the needle's tokens against those of the text around, paired over texts, and how bits are spread."""
    pairs, spread = [], []
    for sample in samples:
        bits, (start, stop) = np.array(sample["bits"]), sample["needle"]
        counted = np.arange(len(bits))
        middle = (counted >= ENDS) & (counted < len(bits) - ENDS)
        inside = (counted >= start) & (counted < stop)
        pairs.append([bits[middle & inside].mean(), bits[middle & ~inside].mean()])
        spread.append(np.quantile(bits[middle & ~inside], (0.05, 0.5, 0.95)))
    differences = np.array(pairs)[:, 0] - np.array(pairs)[:, 1]
    return {
        "needle_bits": float(np.mean(pairs, axis=0)[0]),
        "other_bits": float(np.mean(pairs, axis=0)[1]),
        "difference": float(differences.mean()),
        "interval": bootstrap_interval(differences),
        "p": sign_flip_test(differences),
        "quantiles": np.mean(spread, axis=0).tolist(),
    }


def section(result: Result) -> str:
    found, config = result["summary"], result["config"]
    low, high = found["interval"]
    verdict = "as many bits as" if low <= 0 <= high else "more bits than" if low > 0 else "fewer bits than"
    seen = (
        f"The tokens of the pass key get {verdict} the text around them: {found['needle_bits']:.2f} against"
        f" {found['other_bits']:.2f} bits an element, {found['difference']:+.2f} ({tables.interval(low, high)}, p"
        f" {found['p']:.2g} over {len(result['samples'])} texts)."
    )
    least, half, most = found["quantiles"]
    rest = (
        f"`{config['preset']}` after {config['length']} tokens; the first and last {config['ends']} are left out. Of the"
        f" other tokens one in twenty has less than {least:.2f} bits, half have less than {half:.2f}, one in twenty more"
        f" than {most:.2f}."
    )
    return f"{seen}\n\n{rest}"


def figure(result: Result) -> Figure:
    """The text around a key, every token on the colour of its bits; and bits by position of all texts."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    from benchmarks import figures

    sample = result["samples"][len(result["samples"]) // 2]
    start, stop = (max(0, sample["needle"][0] - AROUND), sample["needle"][1] + AROUND)
    made, panes = figures.panes(1, 2, 8.0, 2.6, height_ratios=(1.4, 1))
    words, axes = panes[:, 0]
    bits = np.array(sample["bits"])
    shade = Normalize(*np.quantile(bits[start:stop], (0.02, 0.98)))
    colors = colormaps["cividis"]
    x, y = 0.0, 0.0
    for token, value in zip(sample["tokens"][start:stop], bits[start:stop]):
        shown = token.replace("\n", "¶").replace("$", r"\$")
        if x + len(shown) > 105:
            x, y = 0.0, y - 1
        dark = shade(value) < 0.55
        words.text(
            x, y, shown, family="monospace", fontsize=7, color="white" if dark else "black",
            bbox={"boxstyle": "square,pad=0.15", "facecolor": colors(shade(value)), "edgecolor": "none"},
        )  # fmt: skip
        x += len(shown)
    words.set(xlim=(-1, 107), ylim=(y - 0.7, 1))
    words.set_axis_off()
    made.colorbar(ScalarMappable(shade, colors), ax=words, label="bits an element")
    for other in result["samples"]:
        axes.plot(other["bits"], color="#B0B0B0", lw=0.5)
    axes.plot(bits, color=figures.COLORS[0], lw=0.8, label="the text above")
    axes.axvspan(*sample["needle"], color=figures.COLORS[1], alpha=0.3, label="its pass key")
    axes.set(xlabel="token", ylabel="bits an element", yscale="log")
    axes.set_yticks(ticks := [2, 3, 4, 6, 8, 16], [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left", ncols=2)
    return made

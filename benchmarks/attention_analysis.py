"""Where SmolLM2 looks in a long context, whether that is known beforehand, and whether more bits for it pay.

Eight held-out texts of 1,024 tokens: entropy of the last queries' attention, its mass by position and layer, and how
well it foretells the attention of the next 64 tokens. Then the same caches with their tokens at mixed precision, more
bits for the tokens of each head that were attended to most, against equally many bytes spread evenly or at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from rich.progress import track

from benchmarks import paired, texts
from benchmarks.schema import Outcome, Result
from benchmarks.tables import interval, percent, table
from mlxkv import lm
from mlxkv.evaluate import metrics
from mlxkv.kernels.bits import pack, unpack
from mlxkv.live.base import causal_mask
from mlxkv.live.methods import full
from mlxkv.live.packing import quantize_per_token
from mlxkv.live.seam import attach
from mlxkv.models import cache_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 5
MODEL = "smollm2-135m"
CONTEXT, QUERIES = 1024, 64
BINS = 32  # of positions


@dataclass(frozen=True)
class Case:
    """Tokens at two precisions. bits: of all on average, and of the case it is compared with. high, low: bits of keys and
    of values. share: of the tokens, those that get the high ones. by: what chooses them in each head. tile: tokens of a
    key's channel that share a scale; 1 for scales by token."""

    bits: int
    high: tuple[int, int]
    low: tuple[int, int]
    share: float = 0.0
    by: str = "past"
    tile: int = 64


# Scales of 64 values add half a bit to each: a half at 4 and a half at 2 take the bytes of 3, a third at 8 of 4.
CASES = {
    "all at 3 bits": Case(3, (3, 3), (3, 3)),
    "all at 3 bits, keys by token": Case(3, (3, 3), (3, 3), tile=1),
    "keys at 4, values at 2": Case(3, (4, 2), (4, 2)),
    "keys at 2, values at 4": Case(3, (2, 4), (2, 4)),
    "half at 4, others at 2: by past attention": Case(3, (4, 4), (2, 2), 1 / 2),
    "half at 4, others at 2: by coming attention": Case(3, (4, 4), (2, 2), 1 / 2, "future"),
    "half at 4, others at 2: first 4 and at random": Case(3, (4, 4), (2, 2), 1 / 2, "random"),
    "half at 4, others at 2: by least attention": Case(3, (4, 4), (2, 2), 1 / 2, "least"),
    "values of half at 4, of others at 2: by past attention": Case(3, (3, 4), (3, 2), 1 / 2),
    "all at 4 bits": Case(4, (4, 4), (4, 4)),
    "all at 4 bits, keys by token": Case(4, (4, 4), (4, 4), tile=1),
    "third at 8, others at 2: by past attention": Case(4, (8, 8), (2, 2), 1 / 3),
    "third at 8, others at 2: by coming attention": Case(4, (8, 8), (2, 2), 1 / 3, "future"),
    "third at 8, others at 2: first 4 and at random": Case(4, (8, 8), (2, 2), 1 / 3, "random"),
}
SHARES = {  # of what `statistics` finds, those between 0 and 1
    "first_4": "mass of the first 4 tokens",
    "last_64": "of the last 64",
    "top_tenth": "of the most attended tenth",
    "foretold": "the next tenth, foretold",
}


class Recorder(full.FullCache):
    """mlx-lm's cache that remembers of its last chunk what the last QUERIES queries attended to."""

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | str | None = None
    ) -> mx.array:
        B, Hq, L, D = queries.shape
        H, T = keys.shape[1:3]
        last = queries[:, :, -QUERIES:].reshape(B, H, -1, min(L, QUERIES), D)
        scores = scale * last @ keys[:, :, None].swapaxes(-1, -2)
        weights = mx.softmax(mx.where(causal_mask(last.shape[-2], T), scores, -mx.inf), axis=-1)
        self.entropy = -(weights * mx.log(mx.maximum(weights, 1e-12))).sum(axis=-1).mean(axis=-1).reshape(B, Hq)
        self.mass = weights.mean(axis=(2, 3))  # [B, Hkv, T]
        output = super().attend(queries, keys, values, scale, mask)
        mx.eval(output, self.entropy, self.mass)
        return output


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    length = CONTEXT + QUERIES + 1
    rows = {kind: tokenizer.encode(read())[:length] for kind, read in texts.OTHER_KINDS.items()}
    chosen = dict(list(rows.items())[::4]) if quick else rows
    cases = {name: case for name, case in CASES.items() if case.bits == 4} if quick else CASES
    attention, samples = analyse(model, mx.array(list(chosen.values())), list(chosen), cases)
    config = {"model": MODEL, "context": CONTEXT, "queries": QUERIES, "bins": BINS, "seed": 0}
    by_layer = {name: values.tolist() for name, values in attention.items()}
    return Outcome(config, samples, {"cases": pays(samples), "attention": by_layer})


def analyse(
    model: Any, rows: mx.array, kinds: Sequence[str], cases: Mapping[str, Case]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Attention statistics of texts `[B, T]`, and the KL of every case and text over the QUERIES tokens after the context."""
    context = rows.shape[1] - QUERIES - 1
    recorders = recording(model)
    mx.eval(model(rows[:, :context], cache=recorders)[:, -1])
    past, entropy = [entry.mass for entry in recorders], [entry.entropy for entry in recorders]
    stored = [(entry.keys[..., :context, :], entry.values[..., :context, :]) for entry in recorders]
    exact = model(rows[:, context:-1], cache=recorders)
    mx.eval(exact)
    future = [entry.mass[..., :context] for entry in recorders]
    samples = []
    for name, case in track(cases.items(), "mixed precision"):
        caches = [mixed(*pair, case, *masses) for pair, *masses in zip(stored, past, future)]
        logits = model(rows[:, context:-1], cache=caches)
        kl = metrics.kl_divergence(exact, logits).mean(axis=-1)
        samples += [{"case": name, "bits": case.bits, "text": kind, "kl": kl[i].item()} for i, kind in enumerate(kinds)]
    return statistics(past, future, entropy), samples


def recording(model: Any) -> list[Any]:
    spec = cache_spec(model)
    attach(model)
    return [Recorder(full.FullConfig(), spec, layer) for layer in spec.attention_layers]


def mixed(keys: mx.array, values: mx.array, case: Case, past: mx.array, future: mx.array) -> KVCache:
    """mlx-lm's cache with keys and values `[B, H, T, D]` as they come back from the case's bits; masses `[B, H, T]`."""
    T = keys.shape[-2]
    random = mx.where(mx.arange(T) < 4, mx.inf, mx.random.uniform(shape=past.shape, key=mx.random.key(0)))
    scores = {"past": past, "future": future, "random": random, "least": -past}[case.by]
    order = mx.argsort(-scores, axis=-1)
    count = int(case.share * T)
    parts = [(mx.sort(order[..., :count], axis=-1), case.high), (mx.sort(order[..., count:], axis=-1), case.low)]
    cache: Any = KVCache()  # type: ignore[no-untyped-call]
    for tokens, (key_bits, value_bits) in parts:
        # In any order: keys have been rotated, so attention does not ask where they stand.
        k, v = (mx.take_along_axis(x, tokens[..., None], axis=-2) for x in (keys, values))
        if tokens.size:
            packed = pack(k, key_bits, case.tile, 1) if case.tile > 1 else quantize_per_token(k, key_bits)
            cache.update_and_fetch(unpack(packed, k.dtype), unpack(quantize_per_token(v, value_bits), v.dtype))
    mx.eval(cache.state)
    return cache


def statistics(past: list[mx.array], future: list[mx.array], entropy: list[mx.array]) -> dict[str, np.ndarray]:
    """By layer `[L]`, means over texts and heads, of what the last queries of the context attended to.

    effective_tokens: exp of the entropy. first_4, last_64, top_tenth: shares of the mass. foretold: of the tenth of the
    tokens that the next QUERIES tokens attend to most, the share that is in the tenth attended to most until now.
    mass_by_position `[L, BINS]`: times the mass that even attention would give.
    """
    mass, coming = (np.array(mx.stack(masses)) for masses in (past, future))  # [L, B, H, T]
    T = mass.shape[-1]
    tenth = T // 10
    top, next_top = (np.argpartition(-x, tenth, axis=-1)[..., :tenth] for x in (mass, coming))
    common = [len(np.intersect1d(*pair)) for pair in zip(top.reshape(-1, tenth), next_top.reshape(-1, tenth))]
    bins = [part.sum(axis=-1).mean(axis=(1, 2)) for part in np.array_split(mass, BINS, axis=-1)]
    return {
        "effective_tokens": np.exp(np.array(mx.stack(entropy))).mean(axis=(1, 2)),
        "first_4": mass[..., :4].sum(axis=-1).mean(axis=(1, 2)),
        "last_64": mass[..., -64:].sum(axis=-1).mean(axis=(1, 2)),
        "top_tenth": np.take_along_axis(mass, top, axis=-1).sum(axis=-1).mean(axis=(1, 2)),
        "foretold": np.array(common).reshape(len(mass), -1).mean(axis=1) / tenth,
        "mass_by_position": BINS * np.stack(bins, axis=1),
    }


def pays(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case's geometric mean of KL, and its ratio to all tokens alike at equally many bytes, paired over texts."""
    kls = {name: [s["kl"] for s in samples if s["case"] == name] for name in dict.fromkeys(s["case"] for s in samples)}
    rows = []
    for name, ours in kls.items():
        bits = CASES[name].bits
        typical = float(np.exp(np.log(np.maximum(ours, paired.LEAST_KL)).mean()))
        rows.append({"case": name, "bits": bits, "kl": typical, **paired.compare(ours, kls[f"all at {bits} bits"])})
    return rows


def section(result: Result) -> str:
    cases, attention, config = result["summary"]["cases"], result["summary"]["attention"], result["config"]
    mass = {key: float(np.mean(attention[key])) for key in SHARES}
    effective = np.array(attention["effective_tokens"])
    tested = [row for row in cases if row["case"] != baseline(row)]
    corrected = {row["case"]: p for row, p in zip(tested, paired.holm([row["p"] for row in tested]))}
    return "\n\n".join(
        [
            f"Attention looks at {effective.mean():.0f} of {config['context']} tokens (exp of its entropy; by layer"
            f" {effective.min():.0f} to {effective.max():.0f}). The first 4 get {percent(mass['first_4'])} of it, the last 64"
            f" {percent(mass['last_64'])}, the most attended tenth {percent(mass['top_tenth'])}; of the tenth that comes to be"
            f" most attended next, {percent(mass['foretold'])} are known from before.",
            answer(cases),
            f"KL to the exact cache over the next {config['queries']} tokens, geometric mean of {cases[0]['texts']} texts, and"
            " its ratio to all tokens at the bits that come to the same bytes: 95 % interval of the mean over texts, exact p of"
            f" sign flips, corrected for {len(tested)} comparisons by Holm's method (so few texts"
            f" give {min(1, len(tested) * 2 ** (1 - cases[0]['texts'])):.2g} at the least).",
            table(
                ["tokens", "bytes of", "KL", "ratio", "95 % interval", "p"],
                [
                    [
                        row["case"],
                        f"{row['bits']} bits",
                        f"{row['kl']:.3g}",
                        *(
                            [
                                f"{row['kl_ratio']:.2f}",
                                interval(*row["kl_ratio_interval"]),
                                f"{corrected[row['case']]:.2g}",
                            ]
                            if row["case"] in corrected
                            else ["1", "", ""]
                        ),
                    ]
                    for row in cases
                ],
            ),
        ]
    )


def baseline(row: Mapping[str, Any]) -> str:
    """The case that spends a row's bytes evenly."""
    return f"all at {row['bits']} bits"


def answer(rows: Sequence[dict[str, Any]]) -> str:
    """Whether precision on the most attended tokens pays, in a sentence for each number of bytes."""
    sentences = []
    for row in rows:
        if "by past attention" in row["case"]:
            low, high = row["kl_ratio_interval"]
            verdict = "pays" if high < 1 else "costs" if low > 1 else "changes nothing for sure"
            sentences.append(
                f"{row['case'].capitalize()} {verdict}: {row['kl_ratio']:.2f} ({low:.2f} to {high:.2f}) times the KL of {baseline(row)}."
            )
    return " ".join(sentences)


def figure(result: Result) -> Figure:
    """Mass by layer and position; shares of mass by layer; KL of the cases."""
    from matplotlib.colors import LogNorm

    from benchmarks import figures

    attention, rows = result["summary"]["attention"], result["summary"]["cases"]
    drawn, panes = figures.panes(3, width=5.3, height=4.4)
    heat, lines, bars = panes[0]
    image = heat.imshow(attention["mass_by_position"], aspect="auto", norm=LogNorm(), cmap="cividis")
    drawn.colorbar(image, ax=heat, label="attention mass, times an even share")
    heat.grid(False)
    heat.set(xlabel=f"position in the context, {result['config']['bins']} bins", ylabel="layer")
    for (key, label), color, style in zip(SHARES.items(), figures.COLORS, figures.STYLES):
        lines.plot(attention[key], color=color, ls=style, label=label)
    lines.set(xlabel="layer", ylabel="share", ylim=(0, 1))
    lines.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    for bits, color, hatch in zip((3, 4), figures.COLORS, ("", "///")):
        own = [row for row in rows if row["bits"] == bits]
        bars.barh(
            [row["case"] for row in own],
            [row["kl"] for row in own],
            color=color,
            hatch=hatch,
            edgecolor="white",
            label=f"bytes of {bits} bits",
        )
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=7)
    bars.set(xscale="log", xlabel="KL to the exact cache (nats a token)")
    bars.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return drawn

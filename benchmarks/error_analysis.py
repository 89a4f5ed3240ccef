"""Where do methods fail? Token by token: kinds of text, lengths, uncertainty, and what had been said before.

SmolLM2 predicts the same 64 tokens of each held-out text after the last 256, 512 and 1,024 tokens before them, read in one
chunk; the 64 follow in chunks of 16. KL of each method at each token is set beside what the full cache makes of it: the
entropy of its prediction, the token's own loss, the entropy of its attention (a mean over layers and heads), the
context's length, and whether token and predecessor occurred before: among the last 92 tokens, the window of
streaming-llm-96, or only before those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from benchmarks import held_out, paired, watched
from benchmarks.held_out import MODEL, PREDICT
from benchmarks.live_runs import followed, prefilled
from benchmarks.schema import Outcome, Result
from benchmarks.tables import percent, table
from mlxkv import lm
from mlxkv.evaluate.statistics import sign_flip_test
from mlxkv.live import live_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 7

LENGTHS = (256, 512, 1024)
METHODS = ("smartkv-0.3", "int4", "kivi-2", "h2o-96", "mp-kvm-96", "streaming-llm-96")
WINDOW = 92  # of streaming-llm-96
AROUND = 16  # tokens shown before one of the worst
WORST = 10
SURE = 0.05
CORRELATES: dict[str, Callable[[dict[str, Any]], float]] = {
    "length of the context": lambda s: s["length"],
    "entropy of the prediction": lambda s: s["entropy"],
    "loss": lambda s: s["loss"],
    "entropy of attention": lambda s: s["attention_entropy"],
    "pair only outside the window": lambda s: s["repeats"] == "outside",
    "pair in the window": lambda s: s["repeats"] == "window",
}


def run(quick: bool) -> Outcome:
    lengths, predict = (LENGTHS[:2], PREDICT // 2) if quick else (LENGTHS, PREDICT)
    model, tokenizer = lm.load(MODEL)
    kinds, rows = held_out.rows(MODEL, tokenizer, max(LENGTHS) + predict + 1)
    if quick:
        kinds, rows = kinds[::4], rows[::4]
    variants = {"full": watched.Settings(), **{method: live_config(method) for method in METHODS}}
    samples = []
    for length in lengths:
        tokens = rows[:, max(LENGTHS) - length :]
        for sample in measured(model, tokens, length, variants):
            target = tokens[sample["text"]][: length + sample["place"] + 2]
            sample |= {"token": tokenizer.decode(target[-1:].tolist()), "repeats": repeats(target)}
            samples.append({**sample, "text": kinds[sample["text"]]})
    summary = summarise(samples)
    for token in summary["worst"]:
        end = max(LENGTHS) + token["place"] + 1
        token["before"] = tokenizer.decode(rows[kinds.index(token["text"])][end - AROUND : end].tolist())
    config = {
        "model": MODEL, "lengths": lengths, "predict": predict, "window": WINDOW,
        "settings": {name: str(settings) for name, settings in variants.items()},
    }  # fmt: skip
    return Outcome(config, samples, summary)


def measured(model: Any, tokens: np.ndarray, length: int, variants: dict[str, Any]) -> list[dict[str, Any]]:
    """A record for each predicted token of texts `[B, length + n + 1]`; the token of place 0 is that at length + 1."""
    caches = prefilled(model, mx.array(tokens[:, :length]), variants)
    reference: list[mx.array] = []
    kl = {}
    for name in variants:
        _, scores = followed(model, caches[name], tokens[:, length:], reference)
        kl[name] = scores["kl"]
        losses = scores["loss_reference"]
    certain = np.concatenate([np.array(watched.entropy(logits.astype(mx.float32))) for logits in reference], axis=1)
    spread = np.mean([np.concatenate([*map(np.array, entry.entropies)], axis=1) for entry in caches["full"]], axis=0)
    return [
        {
            "text": text, "length": length, "place": place,
            "entropy": round(float(certain[text, place]), 5), "loss": round(float(losses[text, place]), 5),
            "attention_entropy": round(float(spread[text, place]), 5),
            "kl": {method: round(float(kl[method][text, place]), 6) for method in variants if method != "full"},
        }
        for text, place in np.ndindex(*losses.shape)
    ]  # fmt: skip


def repeats(tokens: np.ndarray) -> str:
    """Where the last token and the one before it last stood together: "window", "outside" or "nowhere"."""
    pairs = np.flatnonzero((tokens[1:-1] == tokens[-1]) & (tokens[:-2] == tokens[-2]))
    if not len(pairs):
        return "nowhere"
    return "window" if len(tokens) - 2 - pairs[-1] <= WINDOW else "outside"


def summarise(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By method means over kinds, lengths, repeats and deciles of entropy, and what KL goes with; the worst tokens."""
    return {
        "methods": [profile(method, samples) for method in METHODS],
        "lengths": grown(samples),
        "correlates": [row for method in METHODS for row in correlates(method, samples)],
        "worst": worst(samples),
    }


def kind_of(text: str) -> str:
    return text.rstrip("-0123456789")


def profile(method: str, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's mean KL, and how much of its sum falls on the worst tenth of tokens."""
    kl = np.array([s["kl"][method] for s in samples])
    ranked = np.sort(kl)[::-1]
    deciles = np.array_split(np.argsort([s["entropy"] for s in samples], kind="stable"), 10)
    return {
        "method": method,
        "kl": float(kl.mean()),
        "share_of_worst_tenth": float(ranked[: -(-len(kl) // 10)].sum() / ranked.sum()),
        "kinds": means(kl, [kind_of(s["text"]) for s in samples]),
        "lengths": means(kl, [s["length"] for s in samples]),
        "repeats": means(kl, [s["repeats"] for s in samples]),
        "entropy_deciles": [
            {"entropy": fmean(samples[i]["entropy"] for i in part), "kl": float(kl[part].mean())} for part in deciles
        ],
    }


def means(values: np.ndarray, labels: Sequence[Any]) -> dict[str, float]:
    """The mean value of each label, in order of appearance."""
    return {str(name): float(values[[label == name for label in labels]].mean()) for name in dict.fromkeys(labels)}


def grown(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """KL after the longest context against the shortest, text by text, p corrected over methods."""
    texts = list(dict.fromkeys(s["text"] for s in samples))
    lengths = {s["length"] for s in samples}
    rows = []
    for method in METHODS:
        longest, shortest = (
            [fmean(s["kl"][method] for s in samples if (s["text"], s["length"]) == (text, length)) for text in texts]
            for length in (max(lengths), min(lengths))
        )
        rows.append({"method": method, **paired.compare(longest, shortest)})
    for row, p in zip(rows, paired.holm([row["p"] for row in rows])):
        row["p_holm"] = p
    return rows


def correlates(method: str, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spearman's rho of KL with each of CORRELATES within a text, a mean over texts where that varies.

    p is that of the mean over texts, as tokens of a text are not independent, corrected over the correlates.
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    rows: list[dict[str, Any]] = []
    for name, feature in CORRELATES.items():
        rhos = []
        for text in dict.fromkeys(s["text"] for s in samples):
            own = [s for s in samples if s["text"] == text]
            values = [float(feature(s)) for s in own]
            if len(set(values)) > 1:
                rhos.append(float(spearmanr(values, [s["kl"][method] for s in own]).statistic))
        if rhos:
            p = sign_flip_test(np.array(rhos))
            rows.append({"method": method, "with": name, "rho": fmean(rhos), "rhos": rhos, "p": p})
    for row, p in zip(rows, paired.holm([row["p"] for row in rows])):
        row["p_holm"] = p
    return rows


def worst(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens with the highest KL, each with the method and length at which it is highest."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for s in samples:
        method = max(s["kl"], key=lambda name: s["kl"][name])
        token = {**{key: s[key] for key in s if key != "kl"}, "method": method, "kl": s["kl"][method]}
        known = found.get((s["text"], s["place"]))
        if known is None or token["kl"] > known["kl"]:
            found[s["text"], s["place"]] = token
    return sorted(found.values(), key=lambda token: -token["kl"])[:WORST]


def section(result: Result) -> str:
    summary, config = result["summary"], result["config"]
    lengths = {row["method"]: row for row in summary["lengths"]}
    tables = [
        table(
            ("mean KL", *(f"{n} tokens" for n in config["lengths"]), "worst kind", "best kind", "new pair", "pair in window", "pair outside"),
            [
                (row["method"], *(f"{kl:.3g}" for kl in row["lengths"].values()), *ends(row["kinds"]),
                 *(f"{row['repeats'][where]:.3g}" if where in row["repeats"] else "" for where in ("nowhere", "window", "outside")))
                for row in summary["methods"]
            ],
        ),
        table(
            ("rho", *CORRELATES),
            [(method, *(rho(summary["correlates"], method, name) for name in CORRELATES)) for method in METHODS],
        ),
        table(
            ("worst tokens", "token", "KL", "entropy", "pair before", "method", "text, context"),
            [
                (escaped(t["before"]), escaped(t["token"]), f"{t['kl']:.2f}", f"{t['entropy']:.2f}", t["repeats"],
                 t["method"], f"{t['text']}, {t['length']}")
                for t in summary["worst"]
            ],
        ),
    ]  # fmt: skip
    failures = [
        failure(row, lengths[row["method"]], [c for c in summary["correlates"] if c["method"] == row["method"]], config)
        for row in summary["methods"]
    ]
    note = (
        f"Rho is Spearman's within a text, a mean over {lengths[METHODS[0]]['texts']} texts; \\* marks p below {SURE} over texts, corrected by "
        f"Holm over the {len(CORRELATES)} correlates of a method, and the p of lengths over the {len(METHODS)} methods. A pair "
        "is a token and the one before it."
    )
    return "\n\n".join(["\n".join(f"- {sentence}" for sentence in failures), note, *tables])


def ends(kinds: dict[str, float]) -> list[str]:
    """The kinds with the highest and the lowest KL."""
    ranked = sorted(kinds, key=kinds.__getitem__)
    return [f"{kind} {kinds[kind]:.3g}" for kind in (ranked[-1], ranked[0])]


def rho(rows: Sequence[dict[str, Any]], method: str, name: str) -> str:
    """A cell of the table of correlates; * where it is significant."""
    for row in rows:
        if (row["method"], row["with"]) == (method, name):
            return f"{row['rho']:.2f}" + (r" \*" if row["p_holm"] < SURE else "")
    return ""


def failure(row: dict[str, Any], length: dict[str, Any], rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """How a method fails, in words that follow from its numbers."""
    high, low = ends(row["kinds"])
    shortest, longest = min(config["lengths"]), max(config["lengths"])
    times = f"{length['kl_ratio']:.2f} times the KL after {shortest}"
    if length["p_holm"] >= SURE:
        grows = f"{longest} tokens of context have {times}, which is no certain difference"
    else:
        grows = f"{'more' if length['kl_ratio'] > 1 else 'less'} after longer contexts: {longest} tokens have {times}"
    certain = sorted((c for c in rows if c["p_holm"] < SURE), key=lambda c: -abs(c["rho"]))
    goes = "; ".join(f"{'rises' if c['rho'] > 0 else 'falls'} with: {c['with']} ({c['rho']:.2f})" for c in certain[:2])
    return (
        f"**{row['method']}**: {row['kl']:.3g} nats a token, highest on {high}, lowest on {low}. "
        f"{percent(row['share_of_worst_tenth'])} of it falls on the worst tenth of tokens. {grows[0].upper()}{grows[1:]}. "
        f"{'It ' + goes if goes else 'No correlate is certain'}.{lost(row['repeats'])}"
    )


def lost(repeats: dict[str, float]) -> str:
    """What tokens cost whose pair is to be found only outside the window."""
    if not {"outside", "window"} <= repeats.keys():
        return ""
    return (
        f" Where the pair is to be found only outside the window, KL is {repeats['outside'] / repeats['window']:.2f} times that of "
        "pairs in the window."
    )


def escaped(text: str) -> str:
    """A piece of text as Markdown that shows it, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&!])", r"\\\1", " ".join(text.split())) or "(blank)"


def figure(result: Result) -> Figure:
    """Mean KL by method and kind of text, and along the deciles of the full cache's entropy."""
    from matplotlib.colors import LogNorm

    from benchmarks import figures

    rows = result["summary"]["methods"]
    kinds = sorted(rows[0]["kinds"], key=lambda kind: -np.prod([row["kinds"][kind] for row in rows]))
    drawn, axes = figures.panes(columns=2, width=5.4, height=4)
    heat, lines = axes[0]
    cells = np.array([[row["kinds"][kind] for kind in kinds] for row in rows])
    image = heat.imshow(cells, cmap="cividis", norm=LogNorm(), aspect="auto")
    for (i, j), kl in np.ndenumerate(cells):
        heat.text(j, i, f"{kl:.2g}", ha="center", va="center", fontsize=7, color="w" if image.norm(kl) < 0.5 else "k")
    heat.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
    heat.set_yticks(range(len(rows)), [row["method"] for row in rows])
    heat.grid(False)
    heat.set_title("KL to the full cache (nats a token)", loc="left", fontsize=9)
    for row in rows:
        entropy, kl = ([part[key] for part in row["entropy_deciles"]] for key in ("entropy", "kl"))
        lines.plot(entropy, kl, ms=4, label=row["method"], **figures.look(row["method"]))
    lines.set(yscale="log", xlabel="entropy of the full cache's prediction (nats), deciles", ylabel="KL (nats a token)")
    lines.legend(fontsize=7)
    return drawn

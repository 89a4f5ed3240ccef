"""An evaluator by others: does mlx-quant-fidelity measure the same as this project?

The same stretches of held-out documentation go through its KV measurement and through ours, with the same presets on
SmolLM2. A live cache shows a chunk to itself exactly, so how the tokens are fed decides what is measured; both do each of

- chunks: 16 tokens at a time from the first on, as near to generation as is affordable, all positions scored;
- prefix: the first three quarters held, the rest in one chunk and scored; where a method goes by attention it has to see queries,
  which their measurement does not hand over, and only ours is there;
- whole: everything in one chunk, as is its default, on the beginning of the first text only; no live cache changes
  anything then.

Quick: one text, a shorter one, and two presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from rich.progress import track

from benchmarks import texts
from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.errors import UnsupportedError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import iter_logits
from mlxkv.integrations.quant_fidelity import InChunks, LiveMethod
from mlxkv.live.seam import make_cache

PHASE = 1
PRESETS = ("int8", "int4", "kivi-2", "smartkv-0.3", "h2o-256")
QUICK = ("int4", "h2o-96")
CHUNK = 16
WHOLE = 128  # tokens of a text that is given in one chunk
SCORES = ("kl", "flip_rate", "perplexity")
ROUNDING = 1e-3  # of a score, beside 1e-6 of its unit: what two orders of summing float32 may differ by


def run(quick: bool) -> Outcome:
    length, count, presets = (160, 1, QUICK) if quick else (512, 3, PRESETS)
    model, tokenizer = lm.load(MODEL)
    stretches = texts.same_kind(tokenizer, length, count)
    samples = []
    for text, stretch in enumerate(track(stretches, "texts")):
        for feed in ("chunks", "prefix", "whole") if text == 0 else ("chunks", "prefix"):
            chunk = CHUNK if feed == "chunks" else length
            held = length * 3 // 4 if feed == "prefix" else 0
            tokens = stretch[:WHOLE] if feed == "whole" else stretch
            exact = logits(model, make_prompt_cache(model), tokens, held, chunk)
            for preset in presets:
                ours = logits(model, make_cache(model, preset), tokens, held, chunk)
                record = fidelity.compare(exact, ours, tokens[held:])
                sample = {
                    "text": text,
                    "feed": feed,
                    "cache": preset,
                    "ours": {
                        "kl": record["kl"],
                        "flip_rate": 1 - record["top1_agreement"],
                        "perplexity": record["perplexity"],
                    },
                }
                samples.append({**sample, **theirs(model, preset, tokens, held, chunk)})
    config = {
        "model": MODEL, "presets": presets, "tokens": length, "texts": count, "chunk": CHUNK, "held": length * 3 // 4,
        "whole": WHOLE,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def logits(model: Any, cache: list[Any], tokens: Sequence[int], held: int, chunk: int) -> mx.array:
    """Return logits of all but the last token after the first `held`, `[n, vocabulary]`; those held are one chunk."""
    if held:
        model(mx.array([list(tokens[:held])]), cache=cache)
    return mx.concatenate([*iter_logits(model, cache, tokens[held:], chunk)])


def theirs(model: Any, preset: str, tokens: Sequence[int], held: int, chunk: int) -> dict[str, Any]:
    """Return their scores of one text, or none and the reason that they give: a refusal of theirs, or one of the adapter's."""
    from mlx_quant_fidelity.corpora.provenance import Corpus, CorpusProvenance
    from mlx_quant_fidelity.errors import ExactZeroError
    from mlx_quant_fidelity.probes.kv import score_kv_config

    length = len(tokens)
    facts = CorpusProvenance("pydoc_data.topics", "held out", MODEL, length, length, "none", "drop", "none", length)
    try:
        report = score_kv_config(
            InChunks(model, chunk),
            Corpus((mx.array(list(tokens)),), facts),
            model_id=MODEL,
            method=LiveMethod(model, preset),
            quantize_start=held,
        )
    except (ExactZeroError, UnsupportedError) as error:
        return {"theirs": None, "refused": type(error).__name__}
    return {
        "theirs": {"kl": report.kl.mean, "flip_rate": report.flip_rate, "perplexity": report.perplexity_quant},
        "refused": None,
    }


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, by feed and cache, means over texts (of perplexity geometric), and whether all scores of all texts agree."""

    def key(sample: dict[str, Any]) -> tuple[str, str]:
        return sample["feed"], sample["cache"]

    rows = []
    for feed, cache in sorted(dict.fromkeys(map(key, samples)), key=lambda found: found[0]):
        records = [sample for sample in samples if key(sample) == (feed, cache)]
        refused = records[0]["refused"]
        row = {"feed": feed, "cache": cache, "refused": refused, "ours": means([r["ours"] for r in records])}
        if refused is None:
            pairs = np.array([[(r["ours"][s], r["theirs"][s]) for s in SCORES] for r in records])
            apart = np.abs(pairs[..., 0] - pairs[..., 1])
            row |= {
                "theirs": means([r["theirs"] for r in records]),
                "apart": dict(zip(SCORES, apart.max(axis=0).tolist())),
                "agree": bool((apart <= 1e-6 + ROUNDING * np.abs(pairs[..., 0])).all()),
            }
        rows.append(row)
    return rows


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over texts, of perplexity the geometric one."""
    kl, flips, perplexity = np.array([[score[name] for name in SCORES] for score in scores]).T
    return {
        "kl": float(kl.mean()),
        "flip_rate": float(flips.mean()),
        "perplexity": float(np.exp(np.log(perplexity).mean())),
    }


def section(result: Result) -> str:
    rows = result["summary"]
    compared = [row for row in rows if row["refused"] is None]
    apart = [f"{row['cache']} ({row['feed']})" for row in compared if not row["agree"]]
    said = [
        f"Of {len(compared)} measurements that both make, {len(compared) - len(apart)} agree to rounding"
        + (f"; not {', '.join(apart)}." if apart else ".")
        + f" The largest difference of a KL is {max(row['apart']['kl'] for row in compared):.1g} nats."
    ]
    if none := [row["cache"] for row in rows if row["refused"] == "UnsupportedError"]:
        said.append(
            f"It cannot convert a prefix for {', '.join(none)}: they go by attention, and it hands over keys and values only."
        )
    if whole := [row for row in rows if row["refused"] == "ExactZeroError"]:
        said.append(
            f"With the whole text in one chunk it refuses {len(whole)} of {len({row['cache'] for row in rows})} caches as not "
            f"engaged, and ours says a KL of at most {max(row['ours']['kl'] for row in whole):.1g}: a live cache shows a chunk "
            "to itself exactly, so a text has to be fed in parts to see what is lost. The prefix, given the rest in one chunk, "
            "shows the loss of what was held alone."
        )
    said.append(f"Their perplexity, KL in nats and flips are means over {result['config']['texts']} text(s).")
    return "\n\n".join(
        [
            " ".join(said),
            table(
                ["fed", "cache", "KL, theirs", "KL, ours", "flips, theirs", "ours", "perplexity, theirs", "ours"],
                [
                    [
                        row["feed"],
                        row["cache"],
                        *(cell for score, form in FORMS.items() for cell in both(row, score, form)),
                    ]
                    for row in rows
                    if row["refused"] != "ExactZeroError"
                ],
            ),
        ]
    )


FORMS = {"kl": ".3g", "flip_rate": ".3f", "perplexity": ".3f"}


def both(row: dict[str, Any], score: str, form: str) -> list[str]:
    """Return their score and ours as text; a dash where they refuse."""
    return ["-" if row["refused"] else format(row["theirs"][score], form), format(row["ours"][score], form)]

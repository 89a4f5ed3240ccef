"""Ratio and divergence that artifacts give at some qualities, of texts that they were not learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from mlxkv.calibration.texts import Stretch
from mlxkv.codec.artifacts import CalibrationArtifacts, group_facts
from mlxkv.codec.calibrate import calibration_warning
from mlxkv.codec.session import CacheCodec
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant
from mlxkv.sensitivity import context_length

AROUND = (-10, 0, 10)  # qualities to measure, relative to the method's default
FILE_TOKENS = 2_048  # of the file whose ratio is told
MOST_KL = 0.02  # at the default quality: above, predictions differ visibly
_SMALLER = 1.2  # times the ratio that needs no calibration, at least
_WORSE = 2.5  # times the error of what was learnt from, of text that was held out


def qualities(artifacts: CalibrationArtifacts) -> list[float | None]:
    """Return the qualities to measure.

    Parameters
    ----------
    artifacts
        The artifacts.

    Returns
    -------
    list of float or None
        Three around the default; None alone for a method with one ratio.
    """
    default = artifacts.coder().default_quality
    return [None] if default is None else [min(100.0, max(0.0, default + step)) for step in AROUND]


def measure(
    model: Any, codec: CacheCodec, text: Stretch, wanted: Sequence[float | None], fingerprint: str
) -> list[dict[str, Any]]:
    """Code a held-out text and compare predictions from the decoded cache.

    Parameters
    ----------
    model
        The model.
    codec
        With the artifacts.
    text
        The text; its last quarter or so is predicted.
    wanted
        Qualities.
    fingerprint
        The model's.

    Returns
    -------
    list of dict
        A record for each quality: `kind`, `quality`, `tokens`, `kl`, `ratio` of a file of 2,048 tokens, `ratio_middle` of coded
        tokens.
    """
    codecs = [codec if quality is None else codec.with_quality(quality) for quality in wanted]
    return [record for record in measuring(model, codecs, text, fingerprint) if record]


def measuring(
    model: Any, codecs: Sequence[CacheCodec], text: Stretch, fingerprint: str
) -> Iterator[dict[str, Any] | None]:
    """Code a held-out text with one codec after the other, and compare predictions from each decoded cache.

    Parameters
    ----------
    model
        The model.
    codecs
        Each with artifacts of this model.
    text
        The text; its last quarter or so is predicted.
    fingerprint
        The model's.

    Yields
    ------
    dict or None
        None when the text is read, then a record for each codec as `measure` returns them.
    """
    context = context_length(len(text.tokens))
    coded = [codec_variant(each, str(number), fingerprint=fingerprint) for number, each in enumerate(codecs)]
    records = fidelity.iter_records(model, [baseline(), *coded], text.tokens, context, chunk=len(text.tokens))
    next(records)
    yield None
    for codec, record in zip(codecs, records):
        yield {
            "kind": text.kind,
            "quality": codec.quality,
            "tokens": context,
            "kl": record["kl"],
            "ratio": _ratio_of_long_file(codec, record),
            "ratio_middle": record["ratio_middle"],
        }


def _ratio_of_long_file(codec: CacheCodec, record: Mapping[str, Any]) -> float:
    """Return the ratio of a file of 2,048 tokens, in which those beyond the measured ones are coded as small as these."""
    spec, tokens = codec.artifacts.spec, record["tokens"]
    whole = [2 * _width(group) * group.rows(FILE_TOKENS) for group in spec.groups]
    measured = sum(2 * _width(group) * group.rows(tokens) for group in spec.groups)
    other = record["fp16_bytes"] - measured  # states of other layers, which do not grow
    added = sum(whole) - measured
    return float((sum(whole) + other) / (record["cache_bytes"] + added / (record["ratio_middle"] or 1)))


def _width(group: Any) -> int:
    return int(group.stream("k").width + group.stream("v").width)


def table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the means over texts.

    Parameters
    ----------
    records
        What `measure` returned, of all texts.

    Returns
    -------
    list of dict
        For each quality `quality`, `ratio`, `kl` and `worst_kl`, that of the text that diverges most.
    """
    rows = []
    for quality in dict.fromkeys(record["quality"] for record in records):
        found = [record for record in records if record["quality"] == quality]
        kl = [record["kl"] for record in found]
        rows.append(
            {
                "quality": quality,
                "ratio": round(len(found) / sum(1 / record["ratio"] for record in found), 2),
                "kl": float(f"{fmean(kl):.3g}"),
                "worst_kl": float(f"{max(kl):.3g}"),
                "worst_kind": max(found, key=lambda record: record["kl"])["kind"],
            }
        )
    return rows


def refusal(learnt: Sequence[Mapping[str, Any]], free: Sequence[Mapping[str, Any]]) -> str | None:
    """Say why artifacts are not worth using in place of a coding that needs none.

    Parameters
    ----------
    learnt, free
        What `measuring` yields of the same texts: with the artifacts, and with the coding without calibration.

    Returns
    -------
    str or None
        None where they are worth it: files become a fifth smaller at least, and predictions diverge by 0.02 nats a token at
        most, or by twice as much as with the other coding.
    """
    if not learnt:
        return "there was no text to measure what was learnt with"
    (found,), (other,) = (table([{**record, "quality": None} for record in records]) for records in (learnt, free))
    if not found["kl"] <= max(MOST_KL, 2 * other["kl"]):  # NaN too
        return (
            f"files made with what was learnt diverge by {found['kl']:.2g} nats a token, most for {found['worst_kind']}, and"
            f" by {other['kl']:.2g} without it"
        )
    if found["ratio"] < _SMALLER * other["ratio"]:
        return f"files are {found['ratio']:.1f} times smaller with what was learnt, and {other['ratio']:.1f} times without it"
    return None


def warning(artifacts: CalibrationArtifacts, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Say in plain words what is bad about artifacts, and what to do.

    Parameters
    ----------
    artifacts
        The artifacts, with the facts of their training.
    rows
        What `table` returned.

    Returns
    -------
    str or None
        None where nothing is.
    """
    default = artifacts.coder().default_quality
    found = []
    for row in rows:
        if row["quality"] == default and row["kl"] > MOST_KL:
            found.append(
                f"files of held-out text diverge by {row['kl']:.2g} nats a token, most for {row['worst_kind']}: give more time"
                " (--budget-minutes) or text like yours (--text), or compress with a higher --quality"
            )
    if not rows:
        found.append(
            "there was too little text to hold any out: nothing is known of how well files of other texts come back"
        )
    if worse := _far_from_trained(artifacts):
        found.append(
            f"text that was held out comes back {worse:.1f} times less exactly than what was learnt from: use more texts"
        )
    if few := calibration_warning(artifacts.meta):
        found.append(few.replace("dump more or longer texts", "give more text or time"))
    return "; ".join(found) or None


def _far_from_trained(artifacts: CalibrationArtifacts) -> float | None:
    """Return how many times larger errors of held-out tokens are, where they are far larger."""
    worst = 1.0
    for group in range(len(artifacts.spec.groups)):
        facts = artifacts.meta if not group else group_facts(artifacts.meta, group)
        held, trained = facts.get("held_out_error", {}), facts.get("trained_error", {})
        worst = max([worst, *(held[name] / max(trained[name], 1e-9) for name in held if name in trained)])
    return worst if worst > _WORSE else None

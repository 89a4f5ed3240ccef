"""Numbers of committed benchmark results, so that none is written down twice.

A marker on a line of its own becomes a table of rows of benchmarks/results/live_methods.json, with its source:

    {{ result live_methods h2o random }}

with _gemma after the name the same of the result on Gemma, and within a line one number of a summary is `{{ value rate_distortion long/kvtc-rd/at=38/cache_bytes MB }}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
MODELS = {"smollm2-135m": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}  # as captions name them
MODEL, OTHER = next(iter(MODELS)), "_gemma"
TABLE_MARKER = re.compile(r"^\{\{ result (\S+)(.*?) \}\}$", re.MULTILINE)
VALUE_MARKER = re.compile(r"\{\{ value (\S+) (\S+) (\S+) \}\}")

Row = Mapping[str, Any]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in tables and values."""
    up = "../" * (page.file.src_uri.count("/") + 1)

    def filled(match: re.Match[str]) -> str:
        try:
            if match.re is VALUE_MARKER:
                return value(*match.groups())
            return result_table(match.group(1), match.group(2).split(), up)
        except (LookupError, TypeError, StopIteration, OSError) as error:
            raise PluginError(f"{page.file.src_uri}: cannot fill in {match.group()}: {error!r}") from error

    return VALUE_MARKER.sub(filled, TABLE_MARKER.sub(filled, markdown))


FORMATS: dict[str, Callable[[float], str]] = {
    "MB": lambda x: f"{x / 1e6:.1f} MB",
    "percent": lambda x: f"{100 * x:.1f} %",
    "change": lambda x: f"{round(100 * x):+d} %" if round(100 * x) else "0 %",
    "fewer": lambda x: f"{-100 * x:.0f} %",
    "factor": lambda x: f"{x:.0f}",
    "times": lambda x: f"{x:.1f}x",
    "of_fp16": lambda x: f"{100 / x:.1f} %",
    "signed": lambda x: f"{round(x, 2) + 0.0:+.2f}",
    "number": lambda x: f"{x:.2g}",
    "two": lambda x: f"{x:.2f}",
    "count": lambda x: f"{x:,.0f}",
    "text": str,
    "seconds": lambda x: f"{x:.1f} s",
}


@dataclass(frozen=True)
class ResultTable:
    """How the rows of a result are shown.

    Parameters
    ----------
    rows
        The rows of its summary, each with a `label`.
    columns
        Titles, the keys of their values and their formats.
    caption
        Sentences about the measurement, with fields of the configuration and of the first row.
    """

    rows: Callable[[Any], Iterable[Row]]
    columns: Sequence[tuple[str, str, str]]
    caption: str
    head: str = "cache"


def _by_variant(summary: Sequence[Row]) -> list[Row]:
    return [{"label": row["variant"], **row} for row in summary if row.get("group", "all") in ("all", None)]


def _points(points: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [{"label": name, **row} for name, rows in points.items() for row in rows]


def _of_both_models(preset: str, summary: Sequence[Row]) -> list[Row]:
    return [
        {"label": f"{row['model']}, {row['variant']}", **row} for row in summary if row["variant"].startswith(preset)
    ]


def _bd_rates(rates: Mapping[str, Row]) -> list[Row]:
    return [
        {"label": name, **row, "low": row["interval"][0], "high": row["interval"][1]} for name, row in rates.items()
    ]


POINT_COLUMNS = (
    ("at", "at", "count"), ("file", "cache_bytes", "MB"), ("ratio", "ratio", "times"),
    ("sinks and window", "sink_and_window_bytes", "MB"), ("KL", "kl", "number"), ("artifacts", "artifact_bytes", "MB"),
)  # fmt: skip
RATE_COLUMNS = (("bytes at equal KL", "bd_rate", "change"), ("from", "low", "change"), ("to", "high", "change"))
TABLES = {
    "live_methods": ResultTable(
        lambda s: sorted(
            ({"label": row["variant"], **row} for row in s["fidelity"] if row["model"] in MODELS),
            key=lambda row: -row["share_of_fp16"],
        ),
        (("bytes", "share_of_fp16", "percent"), ("KL", "kl", "number"), ("top-1", "top1_agreement", "percent"),
         ("perplexity", "perplexity_delta", "signed")),
        "{who} after {context:,} tokens of {texts} held-out texts; the next {predict} are read through each cache. Bytes are those "
        "held, as a share of float16's; KL is in nats, top-1 the agreement with the untouched cache, perplexity the change.",
    ),
    "kv_bits": ResultTable(
        _by_variant,
        (("bytes", "share_of_fp16", "percent"), ("KL", "kl", "number"), ("top-1", "top1_agreement", "percent"),
         ("perplexity", "perplexity_delta", "signed")),
        "{who} after {context:,} tokens of {texts} held-out texts; the next {predict} are read through each cache.",
    ),
    **{
        name: ResultTable(
            partial(_of_both_models, preset),
            (("bytes", "share_of_fp16", "percent"), ("KL", "kl", "number"), ("times neither", "kl_of_before", "two")),
            "{context:,} tokens of each text are held, and the next {predict} read (texts: {texts}). Bytes are those held then, as a share of "
            "float16's; Gemma's are those of its 3 global layers, and its local ones keep mlx-lm's own cache.",
            "model, cache",
        )
        for name, preset in (("rotation", "int4"), ("rotation_kivi", "kivi"))
    },
    "rate_distortion": ResultTable(
        lambda s: _points(s["long"]), POINT_COLUMNS,
        "Whole files of {tokens:,.0f} tokens of {who}. \"At\" is the ratio that `kvtc` was calibrated for, or the quality "
        "of `kvtc-rd`. The artifacts are shared by all files of a model.", "method",
    ),
    "uncalibrated": ResultTable(
        lambda s: [{"label": row["variant"].replace(" ", "-"), **row} for row in s],
        (("bytes", "share_of_fp16", "percent"), ("KL", "kl", "number"),
         ("of the worst text", "worst_kl", "number"), ("top-1", "top1_agreement", "percent")),
        "Whole files of up to {held:,} tokens of {who}, by quality, and the next {predict} predicted. Bytes are a share of float16's.",
        "cache",
    ),
    "one_command": ResultTable(
        lambda s: [{"label": f"quality {row['quality']}", **row} for row in s["rows"]],
        (("file", "ratio", "times"), ("coded tokens", "ratio_middle", "times"), ("KL", "kl", "number"),
         ("top-1", "top1_agreement", "percent")),
        "{who}, calibrated on {calibration_tokens:,} tokens of the texts that ship along. Means over files of {length:,} tokens of texts of "
        "other kinds and of Python's documentation; the next {predicted} are predicted.", "kvtc-rd at",
    ),
    "store": ResultTable(
        lambda s: [{"label": row["mode"], **row} for row in s["prefixes"] if row["coding"] != "safetensors"],
        (("coded by", "coding", "text"), ("on disk", "file_bytes", "MB"), ("of mlx-lm's file at 16 bits", "ratio_16", "times"),
         ("KL", "kl", "number"), ("same first choice", "top1_agreement", "percent")),
        "{who}, the first {length:,} tokens of texts of six kinds, restored, and the next {predict} predicted.", "store",
    ),
    "rate_points": ResultTable(
        lambda s: _points(s["points"]),
        (("at", "at", "count"), ("coded tokens", "ratio_middle", "times"), ("KL", "kl", "number"),
         ("top-1", "top1_agreement", "percent"), ("perplexity", "perplexity_delta", "signed")),
        "{who}, {held} tokens of {texts} held-out texts, of kinds that calibration has not seen. The ratio is that of the "
        "coded tokens alone, without sinks and window.", "method",
    ),
    "rate_window": ResultTable(
        lambda s: _points(s["points"]), POINT_COLUMNS[:5],
        "`kvtc-rd` on {texts} texts of at most {held:,} tokens, by how the newest tokens are kept.", "newest tokens",
    ),
    "rate_ablation": ResultTable(
        lambda s: _bd_rates(s["bd_rate"]), RATE_COLUMNS,
        "Coded bytes that `kvtc-rd` needs at equal KL when one part is changed, against the whole method, with the "
        "95 % interval over texts.", "changed",
    ),
    "rate_miniatures": ResultTable(
        lambda s: [{**row, "label": f"{model['model'].removeprefix('miniature/')}, {row['label']}"}
                   for model in s for row in _bd_rates(model["bd_rate"])],
        RATE_COLUMNS,
        "Coded bytes at equal KL against `kvtc`, on byte-level models of a few layers that were trained for this "
        "project, with the 95 % interval over texts.", "model, method",
    ),
    "needle": ResultTable(
        _by_variant, (("bytes", "ratio", "of_fp16"), ("digits first", "digits_first", "two"), ("whole key", "found", "two")),
        "A pass key of five digits in essays of {lengths} tokens, {samples} samples. Bytes are a share of float16's; on "
        "a CPU `whole` holds float32.",
    ),
    "ruler": ResultTable(
        _by_variant, (("bytes", "ratio", "of_fp16"), ("score", "score", "two"), ("± over seeds", "score_deviation", "two")),
        "RULER's thirteen tasks at {lengths} tokens, {samples} samples. Bytes are a share of float16's.",
    ),
    "text": ResultTable(
        _by_variant, (("bytes", "ratio", "of_fp16"), ("equal from the start", "equal_leading_tokens", "two"),
                      ("all equal", "exact", "two"), ("ROUGE-L", "rouge_l", "two"), ("BLEU", "bleu", "two")),
        "Greedy continuations of {options[max_tokens]} tokens against those of the untouched cache, {samples} samples.",
    ),
    "profiling": ResultTable(
        _by_variant, (("bytes held", "cache_bytes", "MB"), ("prefill speed", "prefill_relative", "two"),
                      ("decoding speed", "decode_relative", "two")),
        "{who} on a CPU, where the `whole` cache is float32. Speeds are relative to it; below 1 is slower.",
    ),
    "codec_speed": ResultTable(
        lambda s: [{"label": row["step"], **row} for row in s],
        (("median", "median_seconds", "seconds"), ("faster than prefill", "times_faster_than_prefill", "times")),
        "{tokens:,} tokens of {who}, medians of {rounds} rounds.", "step",
    ),
    "compression_sweep": ResultTable(
        lambda s: [{"label": row["method"], **row} for row in s["rows"]],
        (("ratio", "ratio", "count"), ("bytes", "share_of_fp16", "percent"), ("KL", "kl_geometric", "number"),
         ("perplexity, times", "perplexity_growth", "two"), ("whole keys", "found", "percent")),
        "{who} after {context:,} tokens of {texts} texts, and {keys} pass keys; KL is a geometric mean.",
    ),
}  # fmt: skip
SOURCES = {"rate_points": "rate_distortion", "rotation_kivi": "rotation"}


def result_table(name: str, labels: Sequence[str], up: str) -> str:
    """Return a table of the rows with these labels, or of all; `h2o` also stands for h2o-96 and h2o-256."""
    first = name.removesuffix(OTHER)
    origin = SOURCES.get(first, first) + name[len(first) :]
    table, record = TABLES[first], read_result(origin)
    rows = list(table.rows(record["summary"]))
    if labels:
        wanted = re.compile("|".join(f"(?:.*, )?{re.escape(label)}(?:-[0-9.]+)?" for label in labels))
        rows = [row for row in rows if wanted.fullmatch(row["label"])]
    if not rows:
        raise LookupError(f"{name} has no rows {', '.join(labels)}")
    cells = [
        [row["label"] if " " in row["label"] else f"`{row['label']}`", *("" if row.get(key) is None else FORMATS[form](row[key]) for _, key, form in table.columns)]
        for row in rows
    ]  # fmt: skip
    lengths = record["config"].get("options", {}).get("lengths", ())
    renamed = {"context": record["config"].get("context_tokens"), "predict": record["config"].get("eval_tokens")}
    known = {"who": MODELS[record["config"].get("model", MODEL)], **renamed}
    facts = {**known, **record["config"], **rows[0], "lengths": ", ".join(f"{length:,}" for length in lengths)}
    titles = [table.head, *(title for title, _, _ in table.columns)]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *cells]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{shown}\n\n{table.caption.format(**facts)}\n\n{source(origin, record, up)}"


@cache
def read_result(name: str) -> dict[str, Any]:
    """Return a committed result; only its summary, configuration, date and machine are used."""
    return json.loads((ROOT / RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def source(name: str, record: Row, up: str) -> str:
    """Return the line that says where numbers are from."""
    machine = record["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['os'].partition('-')[0]}, MLX {machine['mlx']}"
    metal = "with Metal" if machine.get("metal") else "without Metal"
    commit = f", commit {machine['commit']}" if machine.get("commit") else ""
    link = f"[{name}.json]({up}{RESULTS}/{name}.json)"
    return f"<small>Source: {link}, {record['date'][:10]}{commit}, {where} {metal}.</small>"


def value(name: str, path: str, form: str) -> str:
    """Return one number of a summary, or of the configuration; a part `at=38` of its path is the row of a list whose `at` is 38."""
    record = read_result(name)
    found: Any = record if path.startswith("config/") else record["summary"]
    for part in path.split("/"):
        key, equals, wanted = part.partition("=")
        if isinstance(found, Mapping):
            found = found[part]
        else:
            found = (
                next(row for row in found if str(row[key]).removesuffix(".0").replace(" ", "_") == wanted)
                if equals
                else found[int(part)]
            )
    return FORMATS[form](found)

"""Write the README's result tables from the committed JSON; a test fails when they differ.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.schema import FOLDER, RESULTS

README = FOLDER.parent / "README.md"


def main() -> None:
    README.write_text(updated(README.read_text()))


def updated(text: str) -> str:
    """The README with its two generated sections made anew."""
    for name, tables in (
        ("results", (fidelity, whole_files, speed, lossless, resources)),
        ("live", (live_methods, equal_bytes)),
    ):
        before, rest = text.split(f"<!-- {name} -->")
        after = rest.split(f"<!-- /{name} -->")[1]
        made = "\n\n".join(table() for table in tables)
        text = f"{before}<!-- {name} -->\n{made}\n<!-- /{name} -->{after}"
    return text


def fidelity() -> str:
    rows = {(row["compression_ratio"], row["kind"]): row for row in _load("cr_sweep")["summary"]}
    lines = [
        "| budget | middle | KL, same kind | top-1 | perplexity | KL, other kinds | top-1 | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ratio in sorted({ratio for ratio, _ in rows}):
        same, other = rows[ratio, "same"], rows[ratio, "other"]
        cells = [f"{ratio}x", f"{same['ratio_middle']:.1f}x", *_fidelity_cells(same), *_fidelity_cells(other)]
        lines.append(f"| {' | '.join(cells)} |")
    note = "Four held-out texts of the calibration's kind, eight of others (legal, fiction, essay, three chats, code, API reference)"
    return "\n".join([*lines, "", f"{note}: [cr_sweep.json](benchmarks/results/cr_sweep.json)."])


def whole_files() -> str:
    result = _load("cr_sweep")
    rows = [sample for sample in result["samples"] if sample["kind"] == "long"]
    lines = [
        "| budget | fp16 cache | file | ratio | middle | K / V error | KL | perplexity | artifacts |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row['compression_ratio']}x", _mb(row["fp16_bytes"]), _mb(row["file_bytes"]), f"{row['ratio']:.1f}x", f"{row['ratio_middle']:.1f}x",
            f"{row['k_relative_error']:.4f} / {row['v_relative_error']:.4f}", f"{row['kl']:.4f}", f"{row['perplexity_reference']:.2f} -> {row['perplexity']:.2f}", _mb(row["artifact_bytes"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"The same at {rows[0]['tokens']:,} tokens, one held-out text, whole files:", "", *lines])


def speed() -> str:
    result = _load("codec_speed")
    lines = ["| step | seconds | times faster than prefill |", "|---|---|---|"]
    lines += [
        f"| {row['step']} | {row['median_seconds']:.2f} | {row['times_faster_than_prefill']:.1f} |"
        for row in result["summary"]
    ]
    intro = f"Reading a cache back against computing it again, {result['config']['tokens']:,} tokens, median of {result['config']['rounds']} rounds in one run"
    return "\n".join([f"{intro} ([codec_speed.json](benchmarks/results/codec_speed.json)):", "", *lines])


def lossless() -> str:
    result = _load("lossless")
    caches = [row for row in result["summary"] if "file_bytes" in row]
    coder = [row for row in result["summary"] if "file_bytes" not in row]
    lines = ["| budget, last stage | file | coded middle | compress | decompress |", "|---|---|---|---|---|"]
    for row in caches:
        seconds = (f"{row[step]:.2f} s" for step in ("compress_seconds", "decompress_seconds"))
        lines.append(f"| {' | '.join([row['what'], _mb(row['file_bytes']), _mb(row['coded_bytes']), *seconds])} |")
    speeds = ", ".join(
        f"{row['encode_million_per_second']:.0f} / {row['decode_million_per_second']:.0f} with {row['what'].removeprefix('rANS, ')}"
        for row in coder
    )
    intro = f"DEFLATE against rANS as the last stage, one cache of {result['config']['tokens']:,} tokens, median of {result['config']['rounds']} rounds in one run"
    note = f"rANS alone, in NumPy on one thread, encodes / decodes {speeds} (million symbols a second)."
    return "\n".join([f"{intro} ([lossless.json](benchmarks/results/lossless.json)):", "", *lines, "", note])


def resources() -> str:
    memory, dp = _load("memory"), _load("dp_speed")
    steps = {sample["step"]: sample for sample in memory["samples"]}
    return (
        f"At {memory['config']['tokens']:,} tokens of Qwen3-30B-A3B's geometry the peak is {steps['compress']['peak_over_fp16']:.2f} times the fp16 cache"
        f" to compress and {steps['decompress']['peak_over_fp16']:.2f} times to decompress, the cache itself included"
        " ([memory.json](benchmarks/results/memory.json)).\n"
        f"Allocating its bits (p = {dp['config']['width']:,}, rank {dp['config']['rank']:,}, 4x) takes {dp['summary']['errors_seconds']:.1f} s to measure the groups"
        f" and {dp['summary']['allocate_seconds']:.1f} s for the dynamic programme ([dp_speed.json](benchmarks/results/dp_speed.json))."
    )


def live_methods() -> str:
    result = _load("live_methods")
    summary, config = result["summary"], result["config"]
    speed, keys = ({row["variant"]: row for row in summary[part]} for part in ("speed", "passkey"))
    lines = [
        "| preset | bytes | KL | top-1 | perplexity | pass key | decode |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in summary["fidelity"] if row["model"] == "smollm2-135m" and row["variant"] in keys]
    for row in sorted(rows, key=lambda row: -row["share_of_fp16"]):
        name = row["variant"]
        decode = f"{speed[name]['decode_relative']:.2f}x" if name in speed else ""
        cells = [
            f"`{name}`",
            f"{row['share_of_fp16']:.2f}",
            *_fidelity_cells(row),
            f"{100 * keys[name]['digits_first']:.0f} %",
            decode,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    intro = (
        f"SmolLM2 after {config['context']:,} tokens of {rows[0]['texts']} held-out texts, the next {config['predict']} read through each cache"
        " ([live_methods.json](benchmarks/results/live_methods.json), which has the miniatures too):"
    )
    note = (
        "Bytes are shares of float16's (on a CPU `full` holds float32, so more than 1). Pass key: digits put first, of five keys in"
        f" {config['passkey_context']} tokens. Decode: tokens a second relative to `full`, on two CPU cores."
    )
    return "\n".join([intro, "", *lines, "", note])


def equal_bytes() -> str:
    rows = _load("live_methods")["summary"]["paired"]
    found = {(row["model"], row["variant"], row["against"], row["read"]): row for row in rows}
    line, fits = "between points", "largest that fits"
    names = list(dict.fromkeys(row["variant"] for row in rows if row["model"] == "smollm2-135m"))
    quantized = [("uniform", line), ("uniform", fits), ("kivi", line), ("kivi", fits)]
    evicted = [(against, line) for against in ("h2o", "streaming-llm", "random")]
    tables = []
    for columns, methods in ((quantized, ("smartkv",)), (evicted, ("mp-kvm", "sketch"))):
        cells = {
            f"`{name}`": [_ratio(found["smollm2-135m", name, *column]) for column in columns]
            for name in names
            if name.startswith(methods)
        }
        tables.append(_table("KL, times that of", [_curve(*column) for column in columns], cells))
    picked = [("smartkv-0.3", "uniform", line), ("smartkv-0.5", "uniform", line), ("smartkv-0.5", "uniform", fits), ("smartkv-0.5", "kivi", line),
              ("mp-kvm-96", "h2o", line), ("mp-kvm-96", "random", line)]  # fmt: skip
    models = [model for model in dict.fromkeys(row["model"] for row in rows) if model != "smollm2-135m"]
    heads = [f"`{variant}`: {_curve(*column)}" for variant, *column in picked]
    cells = {f"`{model}`": [_ratio(found[model, *pick]) for pick in picked] for model in models}
    note = (
        "At equal bytes, text by text: geometric means, 95 % intervals and how often better. Between its settings a method's KL is read"
        " off a straight line in the logarithms of bytes and KL, up to float16, which loses nothing."
    )
    other = (
        "The same on the miniatures, none of which was shown to look far back. There neither"
        " attention-guided bits at half the bytes nor centroids can be counted on:"
    )
    return "\n\n".join([note, *tables, other, _table("KL, times that of", heads, cells)])


def _curve(against: str, read: str) -> str:
    return f"{against}, {'on a line' if read == 'between points' else read}"


def _table(corner: str, heads: list[str], rows: dict[str, list[str]]) -> str:
    lines = [f"| {corner} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def _ratio(row: dict[str, Any]) -> str:
    low, high = row["kl_ratio_interval"]
    return f"{row['kl_ratio']:.2g} ({low:.2g} to {high:.2g}), {row['better_on']} of {row['texts']}"


def _fidelity_cells(row: dict[str, Any]) -> list[str]:
    change = f"{row['perplexity_reference']:.1f} {row['perplexity_delta']:+.2f}"
    return [f"{row['kl']:.4f}", f"{100 * row['top1_agreement']:.1f} %", change]


def _load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

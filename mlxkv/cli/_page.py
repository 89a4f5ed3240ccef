"""An evaluation as one page: what was compared, its table, figures, how to read them, and how to run it again.

The page needs no other file and no network: style and figures are inside, and there is no script. Every name is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import takewhile
from typing import Any

from mlxkv.cli import _figures as figures
from mlxkv.cli._figures import Point, plain
from mlxkv.cli._output import format_value

MOST_GRID = 14  # different values of a fact that a grid can show
MOST_TEXTS, LONGEST_TEXT = 3, 700  # samples of which texts are shown, and characters of each
_NO_FACTS = ("seed", "start", "index", "row")  # that no grid is drawn by


@dataclass(frozen=True)
class Result:
    """A run of an evaluation as its JSON has it, and what its figures are drawn from."""

    record: Mapping[str, Any]
    scores: Sequence[str]
    about: str  # the evaluation's help

    @cached_property
    def explained(self) -> list[tuple[str, str]]:
        """The help's words on each score, or on several at once."""
        return re.findall(r"^- ([\w, ]+): (.*)$", self.about, re.MULTILINE)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of all samples together; the first is the untouched cache's."""
        return [row for row in self.record["summary"] if "group" not in row]

    @cached_property
    def names(self) -> list[str]:
        """The variants' names."""
        return [row["variant"] for row in self.rows]

    @cached_property
    def samples(self) -> list[list[dict[str, Any]]]:
        """The records of each sample, one for each variant."""
        records, count = self.record["samples"], len(self.names)
        return [records[i : i + count] for i in range(0, len(records), count)]

    @cached_property
    def facts(self) -> list[dict[str, Any]]:
        """The facts that tell the samples apart: of those before the variant in a record."""
        keys = [*takewhile(lambda key: key != "variant", self.samples[0][0])]
        told = [key for key in keys if len({str(sample[0].get(key)) for sample in self.samples}) > 1]
        return [{key: sample[0].get(key) for key in told} for sample in self.samples]

    def points(self, score: str) -> list[Point]:
        """Return the mean of each variant; its interval is that of the difference from the untouched cache."""
        whole = self.rows[0][score]
        found = []
        for look, row in enumerate(self.rows):
            bounds = row.get(f"{score}_interval") if row["samples"] > 1 else None
            interval = (whole + bounds[0], whole + bounds[1]) if bounds else None
            found.append(
                Point(row["variant"], look, 1 / row["ratio"] if row.get("ratio") else 1.0, row[score], interval)
            )
        return found


def page(record: Mapping[str, Any], scores: Sequence[str], about: str, words: str) -> str:
    """Return the page of a result.

    `record` is what `mlxkv eval --out` writes; `about` the evaluation's help, and `words` the command line.
    """
    result = Result(record, scores, about)
    count = result.rows[0]["samples"]
    title = f"{record['evaluation']} of {record['model']}"
    first = about.split("\n\n")[0]
    sections = [
        _section("Quality against bytes", _scatters(result)),
        _section("Numbers", _table(result)),
        _section("Every sample", _strips(result)),
        _section("By kind", _grids(result)),
        _section("What was written", _texts(result)),
        _section("What was compared", _compared(result)),
        _section("How to read it", _reading(result)),
        _section("Run it again", f"<pre><code>{plain(words)}</code></pre>" if words else ""),
    ]
    chips = [
        f"{count} sample{'s' * (count > 1)}",
        *(f"{name} {record['machine'][name]}" for name in ("mlxkv", "mlx", "mlx-lm")),
        _machine(record["machine"]),
    ]
    style = (files("mlxkv.cli") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{plain(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<header>\n"
        f'<p class="made">mlxkv eval {plain(str(record["evaluation"]))}</p>\n<h1>{plain(title)}</h1>\n<p class="lead">{plain(first)}</p>\n'
        f'<p class="chips">{"".join(f"<span>{plain(chip)}</span>" for chip in chips)}</p>\n</header>\n'
        f"{_legend(result)}\n{''.join(sections)}</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _machine(found: Mapping[str, Any]) -> str:
    system = str(found["os"]).split("-")[0]
    return f"{found['processor']}, {found['cores']} cores, {system}, {'Metal' if found['metal'] else 'no Metal'}"


def _legend(result: Result) -> str:
    marks = [
        f'<span><svg viewBox="0 0 16 16" width="16" height="16" aria-hidden="true">{figures.mark(look, 8, 8, "")}</svg>{plain(name)}</span>'
        for look, name in enumerate(result.names)
    ]
    return f'<p class="legend">{"".join(marks)}</p>'


def _scatters(result: Result) -> str:
    """Return a large figure of the first score, and small ones of the others; none where bytes are not known."""
    if not all(row.get("ratio") for row in result.rows):
        return ""
    first, *others = result.scores
    large = _of_score(result, first, figures.scatter(first, result.points(first), 680, 400))
    small = [
        _of_score(result, score, figures.scatter(score, result.points(score), 480, 300, all_named=False))
        for score in others
    ]
    return (
        '<p class="caption">Further left is smaller; nearer to the dashed line is nearer to the untouched cache. '
        f'Bars are 95 % intervals.</p>{large}<div class="small">{"".join(small)}</div>'
    )


def _strips(result: Result) -> str:
    """Return a figure of all samples for each score; none of a single sample."""
    if len(result.samples) < 2:
        return ""
    told = [", ".join(f"{key} {value}"[:80] for key, value in facts.items()) for facts in result.facts]
    drawn = []
    for score in result.scores:
        rows = {name: [float(sample[i][score]) for sample in result.samples] for i, name in enumerate(result.names)}
        drawn.append(_of_score(result, score, figures.strips(score, rows, result.points(score), told)))
    return (
        '<p class="caption">A dot is a sample: point at it to see which. The upright line is the mean, with the interval '
        f'of its difference from the untouched cache.</p><div class="small">{"".join(drawn)}</div>'
    )


def _grids(result: Result) -> str:
    """Return grids of the first score, where samples are of several groups, or of few lengths or depths."""
    score, keys = result.scores[0], _grid_keys(result)
    if not keys:
        return ""
    tiles: dict[str, dict[tuple[str, str], list[float]]] = {}
    pairs = zip(result.facts, result.samples)
    ordered = pairs if keys == ["group"] else sorted(pairs, key=lambda pair: [pair[0][key] for key in keys])
    for facts, sample in ordered:
        column, *row = [str(facts[key]) if key == "group" else f"{key} {facts[key]:g}" for key in keys]
        for name, record in zip(result.names, sample):
            tile = tiles.setdefault(name if row else "", {})
            tile.setdefault((row[0] if row else name, column), []).append(float(record[score]))
    means = {name: {place: sum(values) / len(values) for place, values in tile.items()} for name, tile in tiles.items()}
    every = [value for tile in means.values() for value in tile.values()]
    drawn = [
        _figure(name, "".join(figures.grids(score, tile, (min(every), max(every))))) for name, tile in means.items()
    ]
    return f'<p class="caption">Means of {plain(_spoken(score))}.</p><div class="tiles">{"".join(drawn)}</div>'


def _grid_keys(result: Result) -> list[str]:
    """Return the facts of samples that grids are drawn by: groups, else one number or two that have few values."""
    if "group" in result.facts[0]:
        return ["group"]
    values = {
        key: {facts[key] for facts in result.facts}
        for key, value in result.facts[0].items()
        if isinstance(value, int | float) and key not in _NO_FACTS
    }
    return [key for key, found in values.items() if len(found) <= MOST_GRID][:2]


def _texts(result: Result) -> str:
    """Return texts that differ between variants, such as answers, of the first samples; what differs is marked."""
    keys = [
        key
        for key, value in result.samples[0][0].items()
        if isinstance(value, str) and key not in ("variant", "group", "verdict")
    ]
    parts: list[str] = []
    for sample in result.samples:
        for key in keys:
            texts = [str(record.get(key, ""))[:LONGEST_TEXT] for record in sample]
            if len(set(texts)) == 1 or len(parts) == MOST_TEXTS:
                continue
            rows = []
            for name, text in zip(result.names, texts):
                same = sum(takewhile(bool, (a == b for a, b in zip(texts[0], text))))
                rest = f"<mark>{plain(text[same:])}</mark>" if text[same:] and text != texts[0] else plain(text[same:])
                rows.append(f"<dt>{plain(name)}</dt><dd>{plain(text[:same])}{rest}</dd>")
            parts.append(f'<dl class="texts">{"".join(rows)}</dl>')
    caption = '<p class="caption">Marked is what differs from what the untouched cache gives, from the first difference on.</p>'
    return caption + "".join(parts) if parts else ""


def _table(result: Result) -> str:
    """Return the summary as a terminal shows it, with intervals and p of every score; groups are folded away."""
    parts = [_rows(result, result.rows)]
    if by_group := [row for row in result.record["summary"] if "group" in row]:
        parts.append(f"<details><summary>By group</summary>{_rows(result, by_group)}</details>")
    return "".join(parts)


def _rows(result: Result, rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ["variant", *(key for key in ("group", "ratio") if key in rows[0])]
    with_p = any(row.get(f"{score}_p") is not None for row in rows for score in result.scores)
    body = []
    for row in rows:
        cells = [plain(format_value(key, row[key])) for key in heads]
        cells += [_number(row, score, with_p) for score in result.scores]
        body.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{plain(_spoken(name))}</th>" for name in [*heads, *result.scores])
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{"".join(body)}</tbody>\n</table></div>'


def _number(row: Mapping[str, Any], score: str, with_p: bool) -> str:
    """Return a cell: the mean, and below it the interval of the difference and its p."""
    deviation, bounds, p = (row.get(f"{score}_{name}") for name in ("deviation", "interval", "p"))
    text = format_value(score, row[score])
    text += f" ± {_short(score, deviation)}" if deviation is not None else ""
    below = [f"{_signed(score, bounds[0])} to {_signed(score, bounds[1])}"] if bounds and row["samples"] > 1 else []
    below += [f"p {p:.2g}"] if with_p and p is not None else []
    return plain(text) + "".join(f"<br/><small>{plain(line)}</small>" for line in below)


def _signed(score: str, value: float) -> str:
    return ("-" if value < 0 else "+" if value > 0 else "") + _short(score, abs(value))


def _short(score: str, value: float) -> str:
    return format_value(score, float(f"{value:.2g}"))


def _compared(result: Result) -> str:
    """Return model, texts, caches and machine."""
    record = result.record
    texts = sorted({str(sample[0]["text"]) for sample in result.samples if sample[0].get("text")})
    lengths = sorted({sample[0]["tokens"] for sample in result.samples if isinstance(sample[0].get("tokens"), int)})
    held = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}" if lengths else ""
    options = {key: value for key, value in record["options"].items() if value is not None}
    machine = record["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("python", "mlxkv", "mlx", "mlx-lm", "numpy") if machine.get(name)
    )
    rows = [
        ("Model", str(record["model"])),
        ("Fingerprint", str(record["fingerprint"])),
        ("Weights", str(record.get("quantization") or "")),
        ("Text", ", ".join(texts)),
        ("Tokens in the cache", held),
        ("Options", format_value("", options)),
        ("Samples", f"{result.rows[0]['samples']}, of {record['seeds']} seed{'s' * (record['seeds'] > 1)}"),
        *(
            (f"{name}", format_value("", dict(record["variants"].get(name) or {"mlx-lm's own cache": ""})).strip())
            for name in result.names
        ),
        ("Machine", f"{_machine(machine)}, {machine['device']}"),
        ("Versions", versions + (f", commit {machine['commit']}" if machine.get("commit") else "")),
    ]
    return f"<dl>{''.join(f'<dt>{plain(name)}</dt><dd>{plain(value)}</dd>' for name, value in rows if value)}</dl>"


def _reading(result: Result) -> str:
    """Return what the scores mean, and what the page's numbers are."""
    lines = [(plain(_spoken(names)), plain(text)) for names, text in result.explained]
    if "ratio" in result.rows[0]:
        on_cpu = "cpu" in str(result.record["machine"]["device"])
        more = "; on a CPU the untouched cache holds float32, and room for 256 tokens at a time" if on_cpu else ""
        text = "bytes of mlx-lm's own cache at 16 bits an element over those of this one; of a file all are counted"
        lines.append(("ratio", text + more))
    if result.rows[0]["samples"] > 1:
        text = "95 %, of the mean difference from the untouched cache on the same samples, by bootstrap over samples"
        lines.append(("intervals", text))
    if any(row.get(f"{result.scores[0]}_p") is not None for row in result.rows):
        text = "two-sided, from flips of the signs of those differences; correct them if you compare many caches"
    else:
        text = "none, since so few samples cannot show a difference at 0.05"
    lines.append(("p", text))
    if result.record["seeds"] > 1:
        lines.append(("±", "standard deviation of the means of seeds"))
    return f"<ul>{''.join(f'<li><b>{name}</b>: {text}</li>' for name, text in lines)}</ul>"


def _of_score(result: Result, score: str, svg: str) -> str:
    """Return a figure with what the score is."""
    return _figure(_spoken(score), svg, next((text for names, text in result.explained if names == score), ""))


def _figure(title: str, svg: str, more: str = "") -> str:
    caption = plain(title) + (f" <span>{plain(more)}</span>" if more else "")
    return f"<figure>{f'<figcaption>{caption}</figcaption>' if caption else ''}{svg}</figure>"


def _spoken(name: str) -> str:
    return name.replace("_", " ")

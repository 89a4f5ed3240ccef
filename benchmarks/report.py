"""The report: all results as REPORT.md and as one HTML page, and the generated parts of the READMEs.

python -m benchmarks.report

Draws every figure as results/<name>.png on the way. A benchmark counts with its full result, or else with its quick
one. The same results give the same bytes, and a test fails where the committed files differ from them.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from markdown_it import MarkdownIt

from benchmarks import pareto, run, tables
from benchmarks.schema import FOLDER, QUICK, RESULTS, Result, read_result
from mlxkv.evaluate.statistics import MOST_FLIPS

README, INDEX = FOLDER.parent / "README.md", FOLDER / "README.md"
REPORT, PAGE = FOLDER / "REPORT.md", FOLDER / "report.html"
PHASES = {
    1: "Baselines at equal bytes",
    2: "The manifold in pictures",
    3: "Compression",
    4: "Ablations",
    5: "Attention and energy",
    6: "Hyper-parameters",
    7: "Error analysis",
    8: "Profiling",
}
HEAD = """\
# Report

Every experiment of this project with its numbers, those that speak against a method included. `python -m benchmarks.report`
makes it from the JSON in [results](results), which has each single measurement; nothing here is written by hand.

**What was measured.** {measured} The language model is SmolLM2-135M; the miniatures beside it are byte-level models of a few
layers, trained for this project.

**What was not.** {mac} No larger model and no context beyond a few thousand tokens has been measured. Where a benchmark takes
the geometry of a larger model, its arrays are made up. {missing}

**How methods are compared.** At equal bytes, counted as they are held or written, scales and raw tokens included. On the same
held-out texts, which calibration never saw, text by text: the ratio is a geometric mean, its 95 % interval comes from resampling the texts, and
p, two-sided, from flips of the signs of the differences: all of them up to {flips} samples, drawn ones beyond. Where a table has several
p they are corrected together, as Holm does, and its text says so. Seeds are in the JSON.

A `+` after a commit says that files differed from it when the benchmark ran. Quick settings are fewer texts and variants."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's module and what it last measured, if it ever ran."""

    name: str
    phase: int
    module: ModuleType
    result: Result | None

    @property
    def title(self) -> str:
        return str(self.module.__doc__).splitlines()[0].removesuffix(".")

    @property
    def quick(self) -> bool:
        return bool(self.result and self.result.get("quick"))  # the oldest results do not say: all are full

    def made(self, part: str) -> Any:
        """Its section or figure. Raises RuntimeError that names the benchmark when that fails."""
        try:
            return getattr(self.module, part)(self.result)
        except Exception as error:
            raise RuntimeError(f"{part} of benchmarks/{self.name}.py failed: {error!r}") from error


def main() -> None:
    benchmarks = found()
    draw(benchmarks)
    for path, text in documents(benchmarks).items():
        path.write_text(text, encoding="utf-8")
        print(path)


def found() -> list[Benchmark]:
    """All benchmarks, in the order of `benchmarks.run`."""
    return [
        Benchmark(name, phase, import_module(f"benchmarks.{name}"), read_result(name))
        for name, phase in run.phases().items()
    ]


def draw(benchmarks: Iterable[Benchmark], folder: Path = RESULTS) -> None:
    """Write the figure of everything that has one and a result."""
    from benchmarks import figures

    for benchmark in [*benchmarks, *overview(benchmarks)]:
        if benchmark.result and hasattr(benchmark.module, "figure"):
            figures.save(benchmark.made("figure"), folder / f"{benchmark.name}.png")


def documents(benchmarks: Sequence[Benchmark]) -> dict[Path, str]:
    """What each generated file has to hold. Reads the READMEs, for what is around their generated parts, and the figures."""
    report = written(benchmarks)
    sections = {b.name: measured(b, README.parent, "brief") for b in benchmarks if hasattr(b.module, "brief")}
    return {
        REPORT: report,
        PAGE: page(report),
        README: filled(README.read_text(encoding="utf-8"), sections),
        INDEX: filled(INDEX.read_text(encoding="utf-8"), {"benchmarks": index(benchmarks)}),
    }


def written(benchmarks: Sequence[Benchmark]) -> str:
    """REPORT.md."""
    parts = [head(benchmarks)]
    for first in overview(benchmarks):
        parts += ["## Quality against bytes", measured(first, FOLDER), picture(first)]
    parts += ["## Contents", contents(benchmarks)]
    for phase in sorted({benchmark.phase for benchmark in benchmarks}):
        parts.append(f"## {heading(phase)}")
        for benchmark in benchmarks:
            if benchmark.phase == phase:
                parts += [f"### {benchmark.title}", measured(benchmark, FOLDER), picture(benchmark)]
    return "\n\n".join(filter(None, parts)) + "\n"


def heading(phase: int) -> str:
    return f"Phase {phase}: {PHASES[phase]}"


def head(benchmarks: Sequence[Benchmark]) -> str:
    results = [benchmark.result for benchmark in benchmarks if benchmark.result]
    quick = sum(benchmark.quick for benchmark in benchmarks)
    measured = f"{len(results)} of {len(benchmarks)} benchmarks, {quick or 'none'} of them with quick settings, on "
    machines = "; ".join(sorted({machine(result) for result in results}))
    mac = "" if any(result["machine"]["metal"] for result in results) else "Nothing in this report is from a Mac."
    missing = ", ".join(f"`{benchmark.name}`" for benchmark in benchmarks if not benchmark.result)
    return HEAD.format(
        measured=f"{measured}{machines}.", mac=mac, missing=missing and f"Not run: {missing}.", flips=MOST_FLIPS
    )


def overview(benchmarks: Iterable[Benchmark]) -> list[Benchmark]:
    """The first figure, made from the result of `live_methods` when there is one."""
    return [
        Benchmark("pareto", 0, pareto, benchmark.result)
        for benchmark in benchmarks
        if benchmark.name == "live_methods" and benchmark.result
    ]


def contents(benchmarks: Sequence[Benchmark]) -> str:
    lines = []
    for phase in sorted({benchmark.phase for benchmark in benchmarks}):
        lines.append(f"- [{heading(phase)}](#{anchor(heading(phase))})")
        lines += [f"  - [{b.title}](#{anchor(b.title)})" for b in benchmarks if b.phase == phase]
    return "\n".join(lines)


def measured(benchmark: Benchmark, folder: Path, part: str = "section") -> str:
    """What a benchmark says, and where it comes from with links relative to `folder`."""
    result = benchmark.result
    if result is None:
        return f"Not run: `python -m benchmarks.run {benchmark.name}`"
    name = result["benchmark"]
    path = (QUICK if benchmark.quick else RESULTS) / f"{name}.json"
    origin = [
        f"[{path.name}]({path.relative_to(folder).as_posix()})",
        f"`python -m benchmarks.run {name}{' --quick' if benchmark.quick else ''}`",
        f"{'quick' if benchmark.quick else 'full'} settings",
        result["date"][:10],
        f"commit {result['machine']['commit']}",
        machine(result),
    ]
    return f"{benchmark.made(part).strip()}\n\n> {' · '.join(origin)}"


def machine(result: Result) -> str:
    found = result["machine"]
    system, metal = found["os"].split("-")[0], "with" if found["metal"] else "without"
    return f"{found['processor']}, {found['cores']} cores, {system}, MLX {found['mlx']} {metal} Metal"


def picture(benchmark: Benchmark) -> str:
    if benchmark.result is None or not hasattr(benchmark.module, "figure"):
        return ""
    return f"![{benchmark.title}](results/{benchmark.name}.png)"


def index(benchmarks: Iterable[Benchmark]) -> str:
    """The table of all benchmarks."""
    rows = [(f"`{benchmark.name}`: {benchmark.title}", str(benchmark.phase)) for benchmark in benchmarks]
    return tables.table(["benchmark", "phase"], rows)


def filled(text: str, parts: Mapping[str, str]) -> str:
    """`text` with new parts between each <!-- name --> and <!-- /name -->. Raises KeyError for a name without a part."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)",
        lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def page(report: str, folder: Path = FOLDER) -> str:
    """REPORT.md as a page that needs no other file: its figures, read from `folder`, are inside."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(report)
    for token, following in pairwise(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(following.content))
    for child in (child for token in tokens for child in token.children or [] if child.type == "image"):
        png = (folder / str(child.attrGet("src"))).read_bytes()
        child.attrSet("src", f"data:image/png;base64,{b64encode(png).decode()}")
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    style = (FOLDER / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>mlxkv: report</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def anchor(title: str) -> str:
    """The name under which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()

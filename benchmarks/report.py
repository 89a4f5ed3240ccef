"""The report: all results as REPORT.md and as one HTML page, and the generated parts of the READMEs.

python -m benchmarks.report              REPORT.md, figures, READMEs, and report.html, which git ignores
python -m benchmarks.report --quick      report.html alone, with quick results where there are no full ones

Draws every figure as results/<name>.png on the way. The same results give the same bytes, and a test fails where the
committed files differ from them.
"""

from __future__ import annotations

import argparse
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from markdown_it import MarkdownIt

from benchmarks import pareto, planned, run, tables
from benchmarks.schema import ENDINGS, FOLDER, MODEL, NAMED, QUICK, RESULTS, Result, read_result, result_name
from mlxkv.evaluate.statistics import MAX_EXACT_SAMPLES

README, INDEX = FOLDER.parent / "README.md", FOLDER / "README.md"
REPORT, PAGE = FOLDER / "REPORT.md", FOLDER / "report.html"
PHASES = {1: "Baselines at equal bytes", 3: "Compression", 8: "Speed and memory"}  # chapters; others are settled
HEAD = """\
# Report

Every experiment that is kept up with its numbers, those that speak against a method included. `python -m benchmarks.report`
makes it from the JSON in [results](results); nothing here is written by hand. [STUDIES.md](STUDIES.md) has the settled ones:
ablations, sweeps and analyses, and how to run them again.

**What was measured.** {measured} The language model is SmolLM2-135M; the miniatures beside it are byte-level models of a few
layers, trained for this project.

**What was not.** {mac} No larger model and no context beyond a few thousand tokens has been measured. Where an experiment takes
the geometry of a larger model, its arrays are made up. {missing}

**How methods are compared.** At equal bytes, counted as they are held or written, scales and raw tokens included. On the same
held-out texts, which calibration never saw, text by text: the ratio is a geometric mean, its 95 % interval comes from resampling the texts, and
p, two-sided, from flips of the signs of the differences: all of them up to {flips} samples, drawn ones beyond. Where a table has several
p they are corrected together, as Holm does, and its text says so. Seeds are in the JSON.

A `+` after a commit says that files differed from it when the experiment ran. Quick settings are fewer texts and variants."""


@dataclass(frozen=True)
class Experiment:
    """An experiment's module and what it last measured on a model, if it ever ran."""

    name: str
    phase: int
    module: ModuleType
    result: Result | None
    model: str = MODEL

    @property
    def title(self) -> str:
        """The first line of its docstring, and the model where it is another one."""
        line = str(self.module.__doc__).splitlines()[0].removesuffix(".")
        return line if self.model == MODEL else f"{line} ({NAMED[self.model]})"

    @property
    def command(self) -> str:
        """What runs it again."""
        name = (self.result or {"benchmark": self.name})["benchmark"].removesuffix(ENDINGS[self.model])
        return f"python -m benchmarks.run {name}{'' if self.model == MODEL else f' --model {self.model}'}"

    @property
    def quick(self) -> bool:
        """Whether its result is of quick settings."""
        return bool(self.result and self.result.get("quick"))  # the oldest results do not say: all are full

    def made(self, part: str) -> Any:
        """Return its section, figure or brief. Raises RuntimeError that names the experiment when that fails."""
        try:
            return getattr(self.module, part)(self.result)
        except Exception as error:
            raise RuntimeError(f"{part} of {self.name} failed: {error!r}") from error


def main() -> None:
    """Write everything, or with --quick the page alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only report.html, quick results included")
    if parser.parse_args().quick:
        with TemporaryDirectory() as folder:
            PAGE.write_text(drawn_page(found(quick=True), Path(folder)), encoding="utf-8")
        print(PAGE)
        return
    experiments = found()
    draw(experiments)
    for path, text in {**documents(experiments), PAGE: page(written(experiments))}.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    print(*planned.write(), sep="\n")


def found(quick: bool = False) -> list[Experiment]:
    """Return all experiments, in the order of `benchmarks.run`, with quick results only where those are asked for."""
    experiments = []
    for name, phase in run.phases().items():
        module = import_module(f"benchmarks.experiments.{name}")
        for model in NAMED:
            result = read_result(result_name(name, model), quick)
            if result or model == MODEL:
                experiments.append(Experiment(result_name(name, model), phase, module, result, model))
    return experiments


def drawn_page(experiments: Sequence[Experiment], folder: Path) -> str:
    """Return the page, with figures that are drawn in a folder of their own."""
    (folder / "results").mkdir()
    draw(experiments, folder / "results")
    return page(written(experiments), folder)


def draw(experiments: Iterable[Experiment], folder: Path = RESULTS) -> None:
    """Write the figure of everything that has one and a result."""
    from benchmarks import figures

    for experiment in [*experiments, *overview(experiments)]:
        if experiment.result and hasattr(experiment.module, "figure"):
            figures.save(experiment.made("figure"), folder / f"{experiment.name}.png")


def documents(experiments: Sequence[Experiment]) -> dict[Path, str]:
    """Return what each committed file has to hold; reads the READMEs, for what is around their generated parts."""
    sections = {e.name: measured(e, README.parent, "brief") for e in experiments if hasattr(e.module, "brief")}
    return {
        REPORT: written(experiments),
        README: filled(README.read_text(encoding="utf-8"), sections),
        INDEX: filled(INDEX.read_text(encoding="utf-8"), {"experiments": index(experiments)}),
    }


def written(experiments: Sequence[Experiment]) -> str:
    """Return REPORT.md."""
    parts = [head(experiments)]
    for first in overview(experiments):
        parts += ["## Quality against bytes", measured(first, FOLDER), picture(first)]
    parts += ["## Contents", contents(experiments)]
    for phase in sorted({experiment.phase for experiment in experiments}):
        parts.append(f"## {PHASES[phase]}")
        for experiment in experiments:
            if experiment.phase == phase:
                parts += [f"### {experiment.title}", measured(experiment, FOLDER), picture(experiment)]
    return "\n\n".join(filter(None, parts)) + "\n"


def head(experiments: Sequence[Experiment]) -> str:
    """Return what stands first: what was measured, what was not, and how."""
    results = [experiment.result for experiment in experiments if experiment.result]
    quick = sum(experiment.quick for experiment in experiments)
    count = f"{len(results)} of {len(experiments)} experiments, {quick or 'none'} of them with quick settings, on "
    machines = "; ".join(sorted({machine(result) for result in results}))
    mac = "" if any(result["machine"]["metal"] for result in results) else "Nothing in this report is from a Mac."
    missing = ", ".join(f"`{experiment.name}`" for experiment in experiments if not experiment.result)
    return HEAD.format(
        measured=f"{count}{machines}.", mac=mac, missing=missing and f"Not run: {missing}.", flips=MAX_EXACT_SAMPLES
    )


def overview(experiments: Iterable[Experiment]) -> list[Experiment]:
    """Return the first figure, made from the result of `live_methods` when there is one."""
    return [
        Experiment("pareto", 0, pareto, experiment.result)
        for experiment in experiments
        if experiment.name == "live_methods" and experiment.result
    ]


def contents(experiments: Sequence[Experiment]) -> str:
    """Return links to all chapters and sections."""
    lines = []
    for phase in sorted({experiment.phase for experiment in experiments}):
        lines.append(f"- [{PHASES[phase]}](#{anchor(PHASES[phase])})")
        lines += [f"  - [{e.title}](#{anchor(e.title)})" for e in experiments if e.phase == phase]
    return "\n".join(lines)


def measured(experiment: Experiment, folder: Path, part: str = "section") -> str:
    """Return what an experiment says, and where it comes from with links relative to `folder`."""
    result = experiment.result
    if result is None:
        return f"Not run: `{experiment.command}`"
    name = result["benchmark"]
    path = (QUICK if experiment.quick else RESULTS) / f"{name}.json"
    origin = [
        f"[{path.name}]({path.relative_to(folder).as_posix()})",
        f"`{experiment.command}{' --quick' if experiment.quick else ''}`",
        f"{'quick' if experiment.quick else 'full'} settings",
        result["date"][:10],
        f"commit {result['machine']['commit']}",
        machine(result),
    ]
    return f"{experiment.made(part).strip()}\n\n> {' · '.join(origin)}"


def machine(result: Result) -> str:
    """Say what a result was measured on."""
    found = result["machine"]
    system, metal = found["os"].split("-")[0], "with" if found["metal"] else "without"
    return f"{found['processor']}, {found['cores']} cores, {system}, MLX {found['mlx']} {metal} Metal"


def picture(experiment: Experiment) -> str:
    """Return a link to its figure, if it has one."""
    if experiment.result is None or not hasattr(experiment.module, "figure"):
        return ""
    return f"![{experiment.title}](results/{experiment.name}.png)"


def index(experiments: Iterable[Experiment]) -> str:
    """Return the table of all experiments."""
    rows = [(f"`{experiment.name}`: {experiment.title}", str(experiment.phase)) for experiment in experiments]
    return tables.table(["experiment", "chapter"], rows)


def filled(text: str, parts: Mapping[str, str]) -> str:
    """Return `text` with new parts between each <!-- name --> and <!-- /name -->. Raises KeyError for a name without a part."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)",
        lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def page(report: str, folder: Path = FOLDER) -> str:
    """Return REPORT.md as a page that needs no other file: its figures, read from `folder`, are inside."""
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
    """Return the name under which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()

"""Run experiments: some by name, a chapter of the report, or all; each in a process of its own, one after the other.

python -m benchmarks.run needle                    one experiment, full settings
python -m benchmarks.run --phase 8 --quick         every experiment of a chapter, in minutes
python -m benchmarks.run --all --quick             everything, in a quarter of an hour on two cores
python -m benchmarks.run needle --model gemma3-270m    on another model; writes results/needle_gemma.json
"""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from time import perf_counter

from benchmarks.schema import ENDINGS, EXPERIMENTS, MODEL, result_name, write_result
from mlxkv.errors import UnsupportedError

# Settled studies, whose code is at a tag, and their chapters; benchmarks/STUDIES.md has their reports.
TAG = "studies-2026-11"
STUDIES = {
    "miniatures": 1, "clustering": 2, "manifold": 2, "compression_sweep": 3, "cr_sweep": 3, "rate_miniatures": 3,
    "codec_ablation": 4, "mp_kvm_ablation": 4, "rate_ablation": 4, "rate_window": 4, "smartkv_ablation": 4,
    "attention_analysis": 5, "energy_spectrum": 5, "precision_map": 5, "hyperparameters": 6, "sketch_grid": 6,
    "error_analysis": 7, "aggregator_speed": 8, "dp_speed": 8, "lossless": 8,
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line names and exit, with 0 where all went well."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = phases()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument(
        "--phase", type=int, choices=sorted({*known.values(), *STUDIES.values()}), help="all of a chapter"
    )
    parser.add_argument("--all", action="store_true", help="all experiments")
    parser.add_argument("--quick", action="store_true", help="few texts and variants; writes results/quick/")
    parser.add_argument("--model", choices=ENDINGS, default=MODEL, help="for experiments that run on several")
    arguments = parser.parse_args(words)
    chosen = [name for name, phase in known.items() if arguments.all or phase == arguments.phase]
    if arguments.model != MODEL:
        chosen = [name for name in chosen if takes_a_model(name)]
    settled = [name for name in arguments.names if name in STUDIES]
    if not chosen:
        settled += [name for name, phase in STUDIES.items() if phase == arguments.phase]
    if unknown := set(arguments.names) - set(known) - set(STUDIES):
        parser.error(f"no experiment {', '.join(sorted(unknown))}")
    if settled:
        parser.error(
            f"{', '.join(settled)}: settled, and reported in benchmarks/STUDIES.md; to run it again: git worktree add"
            f" ../mlxkv-studies {TAG}, and there python -m benchmarks.run {' '.join(settled)}"
        )
    chosen += arguments.names
    if not chosen:
        parser.error("name an experiment, --phase N or --all")
    if arguments.model != MODEL and (fixed := [name for name in chosen if not takes_a_model(name)]):
        parser.error(f"{', '.join(fixed)}: only on {MODEL}")
    how = arguments.quick, arguments.model
    sys.exit(one(chosen[0], *how) if len(chosen) == 1 else several(chosen, *how))


def phases() -> dict[str, int]:
    """Return the chapter of every experiment by name, in the order in which they run, without running any."""
    found = {}
    for path in sorted(EXPERIMENTS.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["PHASE"]:
                found[path.stem] = int(ast.literal_eval(node.value))
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def takes_a_model(name: str) -> bool:
    """Return whether an experiment runs on other models than MODEL, too."""
    return "model" in inspect.signature(import_module(f"benchmarks.experiments.{name}").run).parameters


def one(name: str, quick: bool, model: str = MODEL) -> int:
    """Run an experiment here and write its result.

    Returns
    -------
    int
        The exit code: 0, or UnsupportedError's where it cannot run here.
    """
    start = perf_counter()
    on = {} if model == MODEL else {"model": model}
    try:
        outcome = import_module(f"benchmarks.experiments.{name}").run(quick, **on)
    except UnsupportedError as error:
        print(f"{name} is left out: {error}")
        return error.exit_code
    print(write_result(result_name(name, model), outcome, perf_counter() - start, quick))
    return 0


def several(names: Sequence[str], quick: bool, model: str = MODEL) -> int:
    """Run experiments, each in its own process; one that fails does not stop the others.

    Returns
    -------
    int
        How many failed.
    """
    failed = []
    for name in names:
        start = perf_counter()
        command = [sys.executable, "-m", "benchmarks.run", name, "--model", model, *(["--quick"] if quick else [])]
        if subprocess.run(command, check=False).returncode not in (0, UnsupportedError.exit_code):
            failed.append(name)
        print(f"{name}: {'failed after ' if name in failed else ''}{perf_counter() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    main()

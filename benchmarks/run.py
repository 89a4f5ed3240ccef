"""Run benchmarks: some by name, a phase of the plans, or all; each in a process of its own, one after the other.

python -m benchmarks.run cr_sweep                  one benchmark, full settings
python -m benchmarks.run --phase 4 --quick         every benchmark of a phase, in minutes
python -m benchmarks.run --all --quick             everything, under half an hour on two cores
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from importlib import import_module
from time import perf_counter

from benchmarks.schema import FOLDER, write_result
from mlxkv.errors import UnsupportedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = phases()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--phase", type=int, choices=sorted(set(known.values())), help="all benchmarks of this phase")
    parser.add_argument("--all", action="store_true", help="all benchmarks of all phases")
    parser.add_argument("--quick", action="store_true", help="few texts and variants; writes results/quick/")
    arguments = parser.parse_args()
    chosen = [name for name, phase in known.items() if arguments.all or phase == arguments.phase]
    chosen += arguments.names
    unknown = set(arguments.names) - set(known)
    if not chosen or unknown:
        parser.error(f"no benchmark {', '.join(unknown)}" if unknown else "name a benchmark, --phase N or --all")
    sys.exit(one(chosen[0], arguments.quick) if len(chosen) == 1 else several(chosen, arguments.quick))


def phases() -> dict[str, int]:
    """The phase of every benchmark by name, in the order in which they run; read from the files without running them."""
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["PHASE"]:
                found[path.stem] = int(ast.literal_eval(node.value))
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def one(name: str, quick: bool) -> int:
    """Run a benchmark here and write its result; the exit code, which is UnsupportedError's where it cannot run here."""
    start = perf_counter()
    try:
        outcome = import_module(f"benchmarks.{name}").run(quick)
    except UnsupportedError as error:
        print(f"{name} is left out: {error}")
        return error.exit_code
    print(write_result(name, outcome, perf_counter() - start, quick))
    return 0


def several(names: list[str], quick: bool) -> int:
    """Run benchmarks, each in its own process; how many failed. One that fails does not stop the others."""
    failed = []
    for name in names:
        start = perf_counter()
        command = [sys.executable, "-m", "benchmarks.run", name, *(["--quick"] if quick else [])]
        if subprocess.run(command, check=False).returncode not in (0, UnsupportedError.exit_code):
            failed.append(name)
        print(f"{name}: {'failed after ' if name in failed else ''}{perf_counter() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    main()

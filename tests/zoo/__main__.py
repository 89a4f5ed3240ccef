"""`python -m zoo`: every model type in a process of its own, and docs/models.md from what came of it.

`python -m zoo TYPE` prints what came of one type as JSON.
"""

# isort: off
import mlxkv  # noqa: F401  # before mlx.core: it loads OpenBLAS

# isort: on
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

from zoo.build import model_types
from zoo.report import LEAST, PAGE, Row, counts, measured, page

SECONDS = 60


def apart(name: str) -> Row:
    """What came of each check of one type, in a process of its own."""
    command = [sys.executable, "-m", "zoo", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=os.environ)
    except subprocess.TimeoutExpired:
        return Row(name, [], {}, f"took longer than {SECONDS} seconds")
    if done.returncode:
        return Row(name, [], {}, f"its process ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return Row.from_json(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Print one type, or write the page of all: 1 if fewer than before come out right."""
    if sys.argv[1:]:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            print(json.dumps(measured(sys.argv[1]).to_json()))
        return 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(apart, model_types()))
    PAGE.write_text(page(rows), encoding="utf-8")
    found = counts(rows)
    for row in rows:
        if wrong := row.wrong:
            print(f"{row.name}: {wrong}")
    print(f"{len(rows)} types: {found}; see {PAGE}")
    return int(any(found[key] < least for key, least in LEAST.items()))


if __name__ == "__main__":
    sys.exit(main())

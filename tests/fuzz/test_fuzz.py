"""Whatever a file holds, its reader ends soon, in little memory, with a result or a typed error.

`make fuzz FUZZ_MINUTES=5` goes on with other cases for as long as asked.
"""

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, seed, settings

from fuzz.formats import FORMATS, read
from fuzz.guard import BYTES, outcome
from fuzz.strategies import recipes

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
MINUTES = float(os.environ.get("FUZZ_MINUTES", 0))
CASES = 12  # of each format in the default run

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]


def check(recipe, folder, tell=print):
    tell(f"recipe: {json.dumps(recipe)}")
    _, _, grown = outcome(lambda: read(recipe, folder))
    assert grown < BYTES, f"{grown >> 20} MiB more"


@pytest.mark.parametrize("name", FORMATS)
def test_any_file_is_read_or_refused(name, tmp_path):
    _, variants, kinds = FORMATS[name]
    for variant in variants:  # its example is made outside the limits
        read({"format": name, "variant": variant, "edits": [{"kind": "none", "part": 0, "edit": {}}]}, tmp_path / "a")
    deadline, start = time.monotonic() + 60 * MINUTES / len(FORMATS), int(time.time()) if MINUTES else 0
    while True:
        case = given(recipes(name, variants, **kinds))(lambda recipe: check(recipe, tmp_path / "a", note))
        case = settings(
            max_examples=CASES, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )(seed(start)(case))  # fmt: skip
        case()
        start += 1
        if time.monotonic() > deadline:
            break


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_found_once_stays_right(path, tmp_path):
    check(json.loads(path.read_text()), tmp_path / "a")

"""Thousands of forged or damaged files of one format, counted: python -m fuzz.campaign FORMAT CASES SEED (with tests/ on the path).

Prints one JSON object: how many were read and refused, and those that were read as something else in silence, raised an
untyped error, took too long or took too much memory, with their recipes.
"""

# isort: off
import mlxkv  # noqa: F401  # before mlx.core: it loads OpenBLAS

# isort: on
import collections
import json
import sys
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.formats import FORMATS, read
from fuzz.guard import BYTES, SECONDS, TooLong, outcome
from fuzz.strategies import recipes


def campaign(name, cases, start):
    """Counts of one format."""
    _, variants, kinds = FORMATS[name]
    counts, found, worst = collections.Counter(), [], {"seconds": 0.0, "bytes": 0}

    def count(recipe, folder):
        result, seconds, grown = tried(recipe, folder)
        worst.update(seconds=max(worst["seconds"], seconds), bytes=max(worst["bytes"], grown))
        wrong = {
            "over_seconds": seconds > SECONDS,
            "over_bytes": grown > BYTES,
            result: result in ("silent", "untyped"),
        }
        counts.update([result, "cases"])
        counts.update(key for key in ("over_seconds", "over_bytes") if wrong[key])
        if any(wrong.values()):
            found.append(recipe)

    with tempfile.TemporaryDirectory() as room:
        folder = Path(room) / "a"
        for variant in variants:  # examples are made outside the limits
            read({"format": name, "variant": variant, "edits": [{"kind": "none", "part": 0, "edit": {}}]}, folder)
        while counts["cases"] < cases:  # where few different ones are found at a time
            case = given(recipes(name, variants, **kinds))(lambda recipe: count(recipe, folder))
            settings(
                max_examples=cases - counts["cases"], database=None, deadline=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(seed(start)(case))()  # fmt: skip
            start += 1
    keys = ("cases", "read", "refused", "silent", "untyped", "over_seconds", "over_bytes")
    return {**{key: counts[key] for key in keys}, "slowest_seconds": worst["seconds"], "largest_growth_bytes": worst["bytes"],
            "recipes": found}  # fmt: skip


def tried(recipe, folder):
    """What became of a case, its seconds and its growth in bytes."""
    try:
        result, seconds, grown = outcome(lambda: read(recipe, folder))
    except TooLong:
        return "untyped", 2 * SECONDS, 0
    except AssertionError as error:
        return "silent" if "silently" in str(error) else "untyped", 0.0, 0
    except Exception as error:  # noqa: BLE001  # it is what is looked for
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return "untyped", 0.0, 0
    return ("read" if result == "read" else "refused"), seconds, grown


if __name__ == "__main__":
    print(json.dumps(campaign(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

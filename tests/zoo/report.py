"""docs/models.md, from what came of each model type."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

from zoo.build import CANNOT_RUN, build, cache_kinds
from zoo.checks import CHECKS, Outcome, outcome

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# `make zoo` fails below these.
LEAST = {"restored": 119, "live": 119, "coded": 119, "planned": 122}
LIVE = ("full", "methods", "files")

HEAD = """\
# Models

mlxkv asks a model what it caches, and needs no table of models. This page says what came of every model type that mlx-lm
{mlx_lm} can build: a tiny model of the type with random weights, on which `make zoo` runs the checks and writes this page.

**{restored} of {all} types restore exactly, {live} run live, {coded} are coded to files.**

- **Cache** names mlx-lm's caches of the type's layers: `KVCache` keeps every token, `RotatingKVCache` a window of the newest,
  `ChunkedKVCache` a window that moves in chunks, `ArraysCache` the state of a convolution or recurrence, and a `CacheList`
  holds several for one layer.
- **Dump**: the cache of a text leaves the model, is written, read and restored, and the text goes on. *Identical*: with the
  same bits in every logit, in chunks and one by one, also after the windows are full.
- **Live**: `full` predicts with the same bits as mlx-lm's own cache, `int8`, `int4`, `kivi`, `h2o` and `smartkv` give finite
  logits (`int8` near those of the whole cache) or say why they refuse, and a cache that is saved and loaded goes on identically.
- **Files**: a cache that `kvtc` or `kvtc-rd` has compressed restores, and predictions from it are finite.

[`mlxkv plan`](plan.md) says of {planned} types, from their configuration alone, the very bytes that caches hold after a real text.
Weights are random, so this says what works, and nothing about quality.
"""


class Row(NamedTuple):
    """One type: the kinds of its caches, what came of each check, and a reason where none was made."""

    name: str
    kinds: list[str]
    outcomes: dict[str, Outcome]
    reason: str = ""

    def to_json(self) -> list[Any]:
        """Plain values of the row."""
        return list(self)

    @classmethod
    def from_json(cls, row: list[Any]) -> Self:
        """The row of plain values."""
        name, kinds, outcomes, reason = row
        return cls(name, kinds, {key: Outcome(*value) for key, value in outcomes.items()}, reason)

    def all_ok(self, *checks: str) -> bool:
        """Whether these checks were made and came out right."""
        return all(key in self.outcomes and self.outcomes[key].state == "ok" for key in checks)

    @property
    def wrong(self) -> dict[str, str]:
        """What went wrong, by check."""
        found = {key: note for key, (state, note) in self.outcomes.items() if state == "wrong"}
        return found | ({"process": self.reason} if self.reason.startswith(("took", "its process")) else {})


def measured(name: str) -> Row:
    """What came of each check of one type, in this process."""
    if name in CANNOT_RUN:
        return Row(name, [], {}, CANNOT_RUN[name])
    model = build(name)
    return Row(name, cache_kinds(model), {key: outcome(check, name, model) for key, check in CHECKS.items()})


def counts(rows: list[Row]) -> dict[str, int]:
    """How many types restore, run live, are coded and can be planned."""
    return {
        "restored": sum(row.all_ok("dump") for row in rows),
        "live": sum(row.all_ok(*LIVE) for row in rows),
        "coded": sum(row.all_ok("kvtc", "kvtc-rd") for row in rows),
        "planned": sum(row.all_ok("planned") for row in rows),
    }


def line(row: Row) -> str:
    """The table's line of a type that was run."""
    live = "identical" if row.all_ok(*LIVE) else "refused" if row.outcomes["full"].state == "refused" else "wrong"
    coded = "yes" if row.all_ok("kvtc", "kvtc-rd") else "no"
    dump = row.outcomes["dump"]
    cells = [
        f"`{row.name}`",
        ", ".join(row.kinds),
        dump.note if dump.state == "ok" else dump.state,
        live,
        coded,
        notes(row),
    ]
    return "| " + " | ".join(cells) + " |"


def notes(row: Row) -> str:
    """Reasons of what is refused or wrong, and methods that refuse; each once."""
    told = [
        (key, *each) for key, each in row.outcomes.items() if key != "planned"
    ]  # which files and caches do not need
    found = [note for key, state, note in told if note and (state != "ok" or key == "methods")]
    return "; ".join(dict.fromkeys(found)).replace("|", "\\|")


def why_not(row: Row) -> str:
    """The reason for which a type is not covered."""
    return row.reason or f"its caches are {', '.join(row.kinds)}, and {notes(row)}"


def page(rows: list[Row]) -> str:
    """The whole page."""
    found = counts(rows)
    run = [row for row in rows if row.outcomes]
    table = ["| type | cache | dump | live | files | notes |", "|---|---|---|---|---|---|", *map(line, run)]
    parts = [HEAD.format(all=len(rows), mlx_lm=version("mlx-lm"), **found), "\n".join(table)]
    if missing := [f"- `{row.name}`: {why_not(row)}." for row in rows if not row.all_ok("dump", *LIVE)]:
        parts += ["## Not covered", "\n".join(missing)]
    return "\n\n".join(part.strip() for part in parts) + "\n"

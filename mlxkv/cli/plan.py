"""mlxkv plan: what the caches of a model will take, before it is downloaded."""

from __future__ import annotations

import json as json_module
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxkv.cli._checks import read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._deferred import defer_mlx_lm
from mlxkv.cli._names import model_names
from mlxkv.cli._output import Json, _cell
from mlxkv.cli._work import working
from mlxkv.errors import InputError

if TYPE_CHECKING:
    from mlxkv.planning import Plan, PlannedCache
    from mlxkv.planning.building import Weights

_BYTES_OF_4_BITS = 4.5 / 8  # of a weight, with scale and bias in 16 bits for 64 weights
_BAR = 8  # characters of the longest bar
_LEAST_MEMORY = 10**6
_UNITS = {"": 1, "K": 1024, "M": 1024**2}


@commands.register("plan")
def plan_command(
    model: Annotated[
        str,
        typer.Argument(help="A hub id, a model folder, or a config.json.", autocompletion=model_names),
    ],
    context: Annotated[str, typer.Option(help="Tokens, such as 32K (32,768).", show_default=False)],
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory of the Mac, such as 32GB: say what fits."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of texts of that length.")] = 1,
    everything: Annotated[bool, typer.Option("--all", help="Show every preset.")] = False,
    json: Json = False,
) -> None:
    """Say what the cache of a model takes, and in which form it fits.

    From config.json alone: no weights are needed. Of presets that keep a bounded number of tokens the largest are shown.

    Example: mlxkv plan smollm2-135m --context 8192

    Example: mlxkv plan mlx-community/Qwen3-8B-4bit --context 32K --memory 32GB
    """
    tokens, size = _tokens(context), _memory(memory)
    defer_mlx_lm()
    from mlxkv.planning import plan

    with working(f"planning for {model}"):
        found = plan(model, tokens, batch=batch, memory=size)
    if json:
        print(json_module.dumps({"model": model, **found.to_json()}))
        return
    show_plan(model, found, everything)


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d{1,9})([KM]?)", text.strip().replace(",", ""), re.ASCII | re.IGNORECASE)
    if not match:
        raise InputError(f"--context is a number of tokens, such as 32768, 32K or 1M, not {text[:80]!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def _memory(text: str | None) -> int | None:
    try:
        size = read_size(text)
    except InputError:
        size = 0
    if size is not None and size < _LEAST_MEMORY:  # also a number whose unit was forgotten
        raise InputError(f"--memory is a size with its unit, such as 32GB or 96GB, not {str(text)[:80]!r}")
    return size


def show_plan(model: str, found: Plan, everything: bool = False) -> None:
    """Print head, table and notes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for line in _head(model, found):
        console.print(_cell(line), soft_wrap=True)
    shown = [each for each in found.caches if each.bytes is not None and (everything or _is_shown(each, found))]
    sources = list(
        dict.fromkeys((each.measurement.model, each.measurement.tokens) for each in shown if each.measurement)
    )
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name in ("cache", "GB", "share", ""):
        table.add_column(name, justify="left" if name in ("cache", "") else "right", no_wrap=True)
    for name in ("fits", "longest") if found.usable_bytes is not None else ():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    most = max(each.bytes or 0 for each in shown) if shown else 0
    for each in shown:
        table.add_row(*map(_cell, _cells(each, found, most, sources)))
    console.print()
    console.print(table)
    console.print()
    for line in _notes(found, shown, sources):
        console.print(_cell(line), soft_wrap=True)


def _is_shown(each: PlannedCache, found: Plan) -> bool:
    """Return whether a cache is among those that most people choose from."""
    if each.kind != "live" or each.grows:
        return not (each.kind == "live" and each.bytes == found.caches[0].bytes)
    alike = [other.bytes or 0 for other in found.caches if other.method == each.method and not other.grows]
    return each.bytes == max(alike)


def _head(model: str, found: Plan) -> list[str]:
    weights = found.weights
    size = (
        "of unknown size"
        if weights.bytes is None
        else f"about {_gb(weights.bytes)} GB ({weights.precision}, estimated)"
    )
    texts = "" if found.batch == 1 else f"{found.batch:,} texts of "
    lines = [
        f"{model}: {found.model_type}, {_count(weights.parameters)} parameters, weights {size}",
        f"cache of {texts}{found.context:,} tokens in {'; '.join(map(_kind, found.kinds()))}",
    ]
    if found.trained_context is not None and found.context > found.trained_context:
        lines.append(f"the model was made for {found.trained_context:,} tokens")
    if found.memory is not None and found.usable_bytes is not None:
        lines.append(
            f"of {_gb(found.memory)} GB, {_gb(found.usable_bytes)} GB are for weights and cache, as Metal recommends;"
            " the rest is the system's"
        )
        if weights.bytes is not None and weights.bytes > found.usable_bytes:
            lines.append(_too_large(weights, found.usable_bytes))
    return lines


def _too_large(weights: Weights, usable: int) -> str:
    """Return what to do where weights leave nothing for a cache."""
    small = int(weights.parameters * _BYTES_OF_4_BITS)
    if small >= usable:
        return "the weights alone do not fit"
    return f"the weights alone do not fit; in 4 bits they take about {_gb(small)} GB: plan for a quantized model"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 10**9 else f"{number / 1e6:.3g} million"


def _kind(kind: dict[str, Any]) -> str:
    """Return a kind of layers in words."""
    count = f"{kind['layers']} layer{'s' if kind['layers'] > 1 else ''}"
    if kind["keys"] is None:
        return f"{count} that keep other state"
    keys, values = (f"{heads} x {dim}" for heads, dim in (kind["keys"], kind["values"]))
    shape = f"keys and values {keys}" if keys == values else f"keys {keys}, values {values}"
    return f"{count} ({shape})" + (f" with a window of {kind['window']:,}" if kind["window"] else "")


def _cells(each: PlannedCache, found: Plan, most: int, sources: list[tuple[str, int]]) -> list[str]:
    assert each.bytes is not None
    share = "-" if each.share is None else f"{each.share:.3f}" if each.share < 0.1 else f"{each.share:.2f}"
    cells = [each.cache, _gb(each.bytes), share, "█" * max(1, round(_BAR * each.bytes / most)) if each.bytes else ""]
    if found.usable_bytes is not None:
        cells += ["-" if each.fits is None else "yes" if each.fits else "no", _longest(each)]
    kl = "0" if each.cache == "fp16" else "-"
    if each.measurement is not None:
        kl = f"{each.measurement.kl:.2g}" if each.measurement.kl >= 1e-4 else f"{each.measurement.kl:.6f}"
        kl += f" {_letter(sources.index((each.measurement.model, each.measurement.tokens)))}"
    return [*cells, kl]


def _longest(each: PlannedCache) -> str:
    if each.fits is None:
        return "-"
    if each.longest_context is None:
        return "any"
    digits = max(0, len(str(each.longest_context)) - 3)
    return f"{each.longest_context // 10**digits * 10**digits:,}"


def _letter(index: int) -> str:
    return chr(ord("a") + index)


def _notes(found: Plan, shown: list[PlannedCache], sources: list[tuple[str, int]]) -> list[str]:
    """Return what to know about the numbers."""
    lines = []
    if sources:
        where = "; ".join(f"{_letter(i)}: {model}, {tokens:,} tokens" for i, (model, tokens) in enumerate(sources))
        lines.append(f"KL: how far predictions moved, in nats a token, on the model that was measured ({where})")
    if any(each.kind == "live" and not each.grows for each in shown):
        lines.append(
            "caches that stay this small keep a bounded number of tokens: the longer the text, the more is lost"
        )
    reading = max((each.reading_bytes or 0) - (each.bytes or 0) for each in shown) if shown else 0
    if reading > 0:
        lines.append(f"while a prompt is read, windows hold up to {_gb(reading)} GB more, which counts for what fits")
    reasons: dict[str, list[str]] = {}
    for each in found.caches:
        if each.note:
            reasons.setdefault(each.note, []).append(each.cache)
    lines += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines


def _gb(size: int) -> str:
    """Return bytes in GB, with three digits or two decimals."""
    return f"{size / 1e9:.2f}" if size >= 10**7 else f"{size / 1e9:.2g}"

"""mlxkv eval: every evaluation as a command of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from mlxkv.cli._checks import Dtype, check_out_file
from mlxkv.cli._commands import commands
from mlxkv.cli._names import Model, live_names
from mlxkv.cli._output import Json, counter, note, print_record, print_table
from mlxkv.cli._work import load_model, working

if TYPE_CHECKING:
    from mlxkv.evaluate.journal import Journal
    from mlxkv.evaluate.variants import Variant

FEWEST_FOR_P = 6  # of n paired differences no p is below 2 ** (1 - n), so that of 5 none is below 0.05
PARTIAL = ".partial"  # beside the result, until it is complete


class Evaluations(TyperGroup):
    """Every evaluation as a command, imported when it is asked for. Typer's own types differ by version."""

    def list_commands(self, context: Any) -> list[str]:
        """Return the names of all evaluations."""
        from mlxkv.evaluate import evaluations

        return evaluations.names()

    def get_command(self, context: Any, name: str) -> Any:
        """Return the command of one evaluation, or None."""
        from mlxkv.evaluate import evaluations

        if evaluations.find(name) is None:
            return None
        single = typer.Typer(
            add_completion=False, rich_markup_mode="rich", context_settings=context.command.context_settings
        )
        single.command(name)(_command(name))
        made = typer.main.get_command(single)
        made.name = name
        return made


command = typer.Typer(
    cls=Evaluations,
    no_args_is_help=True,
    help="""Measure the effect of a live cache or a codec on a model, compared with the untouched cache in the same run.

    Example: mlxkv eval fidelity --model smollm2-135m --cache int8

    Example: mlxkv eval needle --model smollm2-135m --cache h2o-96 --cache mp-kvm-96 --seeds 3 --out needle.json
    """,
)


commands.register("eval")(command)


@command.callback()
def _keep_group() -> None:
    """Without a callback typer would leave out a group that lists its own commands."""


def _command(name: str) -> Callable[..., None]:
    """Return the command of an evaluation: the options that all have, and the fields of its own."""
    from mlxkv.evaluate import evaluations

    kind = evaluations.get(name)
    options_class = kind.options_class
    types = get_type_hints(options_class)
    own = [_parameter(field, types[field.name]) for field in fields(options_class)]

    def command(**given: Any) -> None:
        options = options_class(**{field.name: given.pop(field.name) for field in fields(options_class)})
        _evaluate(name, options, **given)

    needed = "".join(f" --{f.name} {f.name.upper()}" for f in fields(options_class) if f.default is MISSING)
    command.__doc__ = (
        f"{_paragraphs(inspect.getdoc(kind) or '')}\n\nExample: mlxkv eval {name}{needed} --model smollm2-135m --cache int8 --out {name}.json\n\n"
        f"If it is interrupted, run it again: it resumes from {name}.json{PARTIAL}."
    )
    shared = Signature.from_callable(_shared, eval_str=True).parameters.values()
    first = [parameter for parameter in shared if parameter.name in ("model", "cache", "artifacts")]
    parameters = [*first, *own, *(parameter for parameter in shared if parameter not in first)]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _paragraphs(text: str) -> str:
    """Return text with the lines of each paragraph joined; those of a list stay apart."""
    return re.sub(r"(?<!\n)\n(?!\n|- ) *", " ", text)


def _shared(
    *,
    model: Model,
    cache: Annotated[
        list[str] | None, typer.Option(help="Live preset or method. May be repeated.", autocompletion=live_names)
    ] = None,
    artifacts: Annotated[
        list[Path] | None,
        typer.Option(help="Folder written by mlxkv calibrate; evaluates that codec. May be repeated."),
    ] = None,
    recent: Annotated[
        int | None, typer.Option(min=0, help="Newest tokens that a codec keeps unquantized (128).")
    ] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help="First tokens that a codec keeps unquantized (4).")] = None,
    dtype: Dtype = "auto",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many samples of each kind and seed, drawn by the seed.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds that samples are drawn with: 0, 1, ...")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON result here: every sample, settings, machine.")
    ] = None,
    json: Json = False,
) -> None:
    """Options of every evaluation."""


def _parameter(field: Any, kind: Any) -> Parameter:
    """Return a command-line option for a field of an evaluation's options; a tuple is given with commas."""
    default = Parameter.empty if field.default is MISSING else field.default
    extra: dict[str, Any] = {"help": f"{field.metadata['help'][:1].upper()}{field.metadata['help'][1:]}."}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        kind, extra["parser"], extra["metavar"] = Any, _list_of(item), f"{item.__name__.upper()},..."
        default = ",".join(map(str, field.default))
    return Parameter(
        field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(**extra)]
    )


def _list_of(item: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in text.split(",") if part.strip())

    return parse


def _evaluate(
    name: str, options: Any, *, model: str, cache: list[str] | None, artifacts: list[Path] | None, recent: int | None, sinks: int | None,
    dtype: str, limit: int | None, seeds: int, out: Path | None, json: bool,
) -> None:  # fmt: skip
    from json import dumps

    from mlxkv import lm
    from mlxkv.errors import InputError
    from mlxkv.evaluate import evaluations
    from mlxkv.evaluate.machine import describe
    from mlxkv.evaluate.runner import run
    from mlxkv.io.atomic import atomic_write
    from mlxkv.io.container import digest
    from mlxkv.io.inputs import open_input

    if out:
        check_out_file(out)
    texts = {}
    for given in (value for value in vars(options).values() if isinstance(value, Path)):
        if not given.exists():
            raise InputError(f"cannot read {given}: there is no such file or folder")
        # Only a run that can be gone on with has to know that they are the same; a folder can be large.
        for path in sorted(found for found in (given, *given.rglob("*")) if found.is_file()) if out else ():
            with open_input(path) as file:
                texts[str(path)] = digest(file.read()).hex()
    variants = _variants(cache or [], artifacts or [], {"recent": recent, "sinks": sinks}, dtype)
    # Samples of another text, commit or machine are not gone on with.
    same: dict[str, Any] = {"files": texts, "machine": describe()}
    with _journal(out, same) as journal:  # before the work, in case another run has it
        loaded, tokenizer = load_model(model)
        facts = {"model": model, "fingerprint": lm.fingerprint(loaded), "quantization": lm.quantization(loaded)}
        same |= facts
        left = f"finished samples are in {journal.path}; the same command goes on from there" if journal else ""
        with working(name, left, spin=False), counter(f"measuring {name}") as (progress, task):
            result = run(
                name, loaded, tokenizer, variants, options, seeds=seeds, limit=limit, journal=journal,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        record = {**facts, **result, "machine": same["machine"]}
        if out and journal:
            with atomic_write(out) as file:
                file.write(dumps(record, indent=1).encode())
            journal.finish()
    if json:
        print_record(record, as_json=True)
    else:
        _show(name, model, result["summary"], evaluations.get(name).scores)


def _show(name: str, model: str, rows: list[dict[str, Any]], scores: tuple[str, ...]) -> None:
    """Print the table, and what its numbers do not say by themselves."""
    import mlx.core as mx

    samples = rows[0]["samples"]
    title = f"{name} of {model}, {samples} sample{'s' * (samples > 1)}"
    with_p = samples >= FEWEST_FOR_P
    if with_p:
        title += f"; p: of a difference in {scores[0].replace('_', ' ')}"
    if any("group" in row for row in rows):
        rows = [{"group": "all", **row} for row in rows]
    print_table([_row(row, scores, with_p) for row in rows], as_json=False, title=title)
    if 1 < samples < FEWEST_FOR_P:
        note(f"{samples} samples cannot show a difference at p < 0.05; {FEWEST_FOR_P} or more can")
    if "ratio" in rows[0] and mx.default_device() == mx.cpu:
        note(
            "ratios are against float16; on a CPU the untouched cache holds float32, and room for 256 tokens at a time"
        )


def _variants(
    caches: list[str], folders: list[Path], codec_options: dict[str, int | None], dtype: str
) -> list[Variant]:
    """Return what is compared with the untouched cache. Raises InputError for options that do not go together."""
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.session import CacheCodec
    from mlxkv.errors import InputError
    from mlxkv.evaluate.variants import codec_variant, live_variant

    given: dict[str, Any] = {key: value for key, value in codec_options.items() if value is not None}
    if not folders and (given or dtype != "auto"):
        raise InputError(
            "--recent, --sinks and --dtype say how to compress, with --artifacts; --cache takes none of them"
        )
    codecs = {str(folder): CacheCodec(CalibrationArtifacts.from_dir(folder), **given) for folder in folders}
    return [*map(live_variant, caches), *(codec_variant(codec, folder, dtype) for folder, codec in codecs.items())]


@contextmanager
def _journal(out: Path | None, facts: dict[str, Any]) -> Iterator[Journal | None]:
    """Keep finished samples until the result is complete."""
    from mlxkv.evaluate.journal import Journal

    if out is None:
        yield None
        return
    with Journal(out.with_name(out.name + PARTIAL), facts) as journal:
        yield journal


def _row(row: dict[str, Any], scores: tuple[str, ...], with_p: bool) -> dict[str, Any]:
    """Return the cells of a summary's row that fit into a terminal.

    Means with their deviation over seeds, and the first score's p, which of few samples says nothing.
    """
    cells: dict[str, Any] = {key: row[key] for key in ("variant", "group", "ratio") if key in row}
    for score in scores:
        deviation = row.get(f"{score}_deviation")
        cells[score] = row[score] if deviation is None else f"{row[score]:.4g} ± {deviation:.2g}"
    return cells | ({"p": row.get(f"{scores[0]}_p") if row["samples"] >= FEWEST_FOR_P else None} if with_p else {})

"""mlxkv eval: every evaluation as a command of its own."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperGroup

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._commands import commands
from mlxkv.cli._names import codec_method_names, live_names, model_names
from mlxkv.cli._output import counter, note, print_record, print_table
from mlxkv.cli._work import load_model, working

if TYPE_CHECKING:
    from mlxkv.evaluate.journal import Journal
    from mlxkv.evaluate.variants import Variant

FEWEST_FOR_P = 6  # of n paired differences no p is below 2 ** (1 - n), so that of 5 none is below 0.05
PARTIAL = ".partial"  # beside the result, until it is complete
PANEL = "Options of every evaluation"
LONGEST_DEFAULT = 40  # characters of a list that help shows; a longer one is everything there is


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

    Example: mlxkv eval fidelity --model smollm2-135m --cache int8 --html fidelity.html
    """,
)


commands.register("eval")(command)


@command.callback()
def _keep_group() -> None:
    """Without a callback typer would leave out a group that lists its own commands."""


def _command(name: str) -> Callable[..., None]:
    """Return the command of an evaluation: the fields of its own, and the options that all have."""
    from mlxkv.evaluate import evaluations

    kind = evaluations.get(name)
    options_class = kind.options_class
    types = get_type_hints(options_class)
    own = [_parameter(field, types[field.name]) for field in fields(options_class)]
    shared = [*Signature.from_callable(_shared, eval_str=True).parameters.values()]

    def command(**given: Any) -> None:
        words = _words(name, [*shared, *own], given)
        options = options_class(**{field.name: given.pop(field.name) for field in fields(options_class)})
        _evaluate(name, options, words=words, **given)

    needed = "".join(f" --{f.name} {f.name.upper()}" for f in fields(options_class) if f.default is MISSING)
    command.__doc__ = f"{help_of(kind)}\n\nExample: mlxkv eval {name} --model smollm2-135m --cache int8{needed}"
    parameters = [*own, *shared]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def help_of(kind: type) -> str:
    """Return the docstring of an evaluation but for its notes, each paragraph in one line; those of a list stay apart."""
    text = (inspect.getdoc(kind) or "").partition("\n\nNotes\n-----\n")[0]
    return re.sub(r"(?<!\n)\n(?!\n|- ) *", " ", text)


def _words(name: str, parameters: Sequence[Parameter], given: Mapping[str, Any]) -> str:
    """Return the command line of what was given: options that are as they are by default are left out."""
    words = ["mlxkv", "eval", name]
    for parameter in parameters:
        value = given[parameter.name]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        if text is None or text == parameter.default or parameter.name == "json":
            continue
        for item in text if isinstance(text, list) else [text]:
            words += [f"--{parameter.name.replace('_', '-')}", str(item)]
    return shlex.join(words)


def _common(text: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    """Return an option of every evaluation, in a panel of its own."""
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel=PANEL, show_default=False, **more)


def _shared(
    *,
    model: Annotated[str, _common("Folder, hub id or smollm2-135m.", "NAME", autocompletion=model_names)],
    cache: Annotated[
        list[str] | None, _common("Live cache to compare. May be repeated.", "NAME", autocompletion=live_names)
    ] = None,
    method: Annotated[
        list[str] | None,
        _common("Codec of files to compare. May be repeated.", "NAME", autocompletion=codec_method_names),
    ] = None,
    artifacts: Annotated[list[Path] | None, _common("Folder of the artifacts of files to compare.", "DIR")] = None,
    recent: Annotated[int | None, _common("Newest tokens that a file treats better (128).", "N")] = None,
    sinks: Annotated[int | None, _common("First tokens that a file keeps exactly (4).", "N")] = None,
    dtype: Annotated[
        Literal["auto", "float16", "float32"], _common("What is coded: auto, float16 or float32.", "TYPE")
    ] = "auto",
    limit: Annotated[int | None, _common("Most samples of each kind and seed.", "N")] = None,
    seeds: Annotated[int, _common("Seeds that samples are drawn with (1).", "N")] = 1,
    out: Annotated[Path | None, _common("Write JSON; resumes from FILE.partial.", "FILE")] = None,
    html: Annotated[Path | None, _common("Write a page with tables and figures.", "FILE")] = None,
    json: Annotated[bool, _common("Print one JSON document.", None, "--json")] = False,
) -> None:
    """Options of every evaluation."""


def _parameter(field: Any, kind: Any) -> Parameter:
    """Return a command-line option for a field of an evaluation's options; a tuple is given with commas."""
    default, text = field.default, field.metadata["help"]
    extra: dict[str, Any] = {"metavar": _METAVARS.get(kind)}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        default = ",".join(map(str, default))
        kind, extra["parser"], extra["metavar"] = Any, _list_of(item), f"{_METAVARS.get(item, 'NAME')},..."
    if default not in (None, MISSING):
        text += f" ({default if len(str(default)) <= LONGEST_DEFAULT else 'all'})"
    option = typer.Option(help=f"{text[:1].upper()}{text[1:]}.", show_default=False, **extra)
    default = Parameter.empty if default is MISSING else default
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH", Path | None: "PATH"}


def _list_of(item: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(item(part.strip()) for part in text.split(",") if part.strip())

    return parse


def _evaluate(
    name: str, options: Any, *, words: str, model: str, cache: list[str] | None, method: list[str] | None, artifacts: list[Path] | None,
    recent: int | None, sinks: int | None, dtype: str, limit: int | None, seeds: int, out: Path | None, html: Path | None, json: bool,
) -> None:  # fmt: skip
    from json import dumps

    from mlxkv import lm
    from mlxkv.cli._page import page
    from mlxkv.evaluate import evaluations
    from mlxkv.evaluate.machine import describe
    from mlxkv.evaluate.runner import run
    from mlxkv.io.atomic import atomic_write

    for path, other in ((out, None), (html, out)):
        if path:
            check_out_file(path, other)
    # Only a run that can be gone on with has to know that they are the same.
    texts = _digests(options, read=out is not None)
    coding = {key: value for key, value in (("recent", recent), ("sinks", sinks)) if value is not None}
    variants = _variants(cache or [], method or [], artifacts or [], coding, dtype)
    # Samples of another text, commit or machine are not gone on with.
    same: dict[str, Any] = {"files": texts, "machine": describe()}
    with _journal(out, same) as journal:  # before the work, in case another run has it
        loaded, tokenizer = load_model(model)
        facts = {"model": model, "fingerprint": lm.fingerprint(loaded), "quantization": lm.quantization(loaded)}
        same |= facts
        if method or not variants:
            variants += _files(loaded, facts["fingerprint"], model, method or [None], coding, dtype)
        left = f"finished samples are in {journal.path}; the same command goes on from there" if journal else ""
        with working(name, left, spin=False), counter(f"measuring {name}") as (progress, task):
            result = run(
                name, loaded, tokenizer, variants, options, seeds=seeds, limit=limit, journal=journal,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        record = {**facts, **result, "machine": same["machine"]}
        kind = evaluations.get(name)
        if html:
            with atomic_write(html) as file:
                file.write(page(record, kind.scores, help_of(kind), words).encode())
        if out:
            with atomic_write(out) as file:
                file.write(dumps(record, indent=1).encode())
        if journal:
            journal.finish()
    if json:
        print_record(record, as_json=True)
    else:
        _show(name, model, result["summary"], kind.scores)


def _digests(options: Any, read: bool) -> dict[str, str]:
    """Return digests of the files that options name, if they are to be read. Raises InputError for those that are missing."""
    from mlxkv.errors import InputError
    from mlxkv.io.container import digest
    from mlxkv.io.inputs import open_input

    found = {}
    for given in (value for value in vars(options).values() if isinstance(value, Path)):
        if not given.exists():
            raise InputError(f"cannot read {given}: there is no such file or folder")
        for path in sorted(path for path in (given, *given.rglob("*")) if path.is_file()) if read else ():
            with open_input(path) as file:
                found[str(path)] = digest(file.read()).hex()
    return found


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
    caches: list[str], methods: list[str], folders: list[Path], coding: dict[str, Any], dtype: str
) -> list[Variant]:
    """Return what is compared with the untouched cache, but for files by their method, which need the model.

    Raises InputError for options that do not go together, and for a method that is not there.
    """
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.codec.methods import codec_methods
    from mlxkv.codec.session import CacheCodec
    from mlxkv.errors import InputError
    from mlxkv.evaluate.variants import codec_variant, live_variant

    if caches and not methods and not folders and (coding or dtype != "auto"):
        raise InputError(
            "--recent, --sinks and --dtype say how to compress, with --method or --artifacts; --cache takes none of them"
        )
    for method in methods:
        codec_methods.get(method)
    codecs = {str(folder): CacheCodec(CalibrationArtifacts.from_dir(folder), **coding) for folder in folders}
    return [*map(live_variant, caches), *(codec_variant(codec, folder, dtype) for folder, codec in codecs.items())]


def _files(
    model: Any, fingerprint: str, name: str, methods: Sequence[str | None], coding: dict[str, Any], dtype: str
) -> list[Variant]:
    """Return files as `mlxkv compress` makes them, by method; None for the one that it takes by itself."""
    from mlxkv.codec import library
    from mlxkv.codec.session import CacheCodec
    from mlxkv.evaluate.variants import codec_variant
    from mlxkv.models import cache_spec

    spec = cache_spec(model)
    found = [library.for_model(spec, fingerprint, name, method) for method in methods]
    return [codec_variant(CacheCodec(artifacts, **coding), artifacts.method_name, dtype) for artifacts in found]


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

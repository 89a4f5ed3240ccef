"""Settings and presets of methods, from their source.

A marker `{{ settings h2o }}` on a line of its own becomes a table of the method's settings, `{{ presets h2o }}` one of
its presets.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^\{\{ (settings|presets) (\S+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in tables."""

    def filled(match: re.Match[str]) -> str:
        try:
            return (settings_table if match.group(1) == "settings" else presets_table)(match.group(2))
        except (LookupError, StopIteration, OSError) as error:
            raise PluginError(f"{page.file.src_uri}: cannot fill in {match.group()}: {error!r}") from error

    return MARKER.sub(filled, markdown)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *rows])


def settings_table(method: str) -> str:
    """Return a table of the settings of a method's `Config`, those it inherits included."""
    config = _config_class(method)
    meanings: dict[str, str] = {}
    fields: dict[str, griffe.Attribute] = {}
    for part in [*reversed(config.mro()), config]:
        for section in part.docstring.parsed if part.docstring else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                meanings |= {
                    parameter.name: " ".join(parameter.description.split()).replace("|", "\\|")
                    for parameter in section.value
                }
        fields |= {
            name: member for name, member in part.members.items()
            if isinstance(member, griffe.Attribute) and member.annotation is not None and not name.startswith("_")
            and "ClassVar" not in str(member.annotation)
        }  # fmt: skip
    if not fields:
        return "There is nothing to set."
    rows = [[f"`{name}`", *_default_and_range(field), meanings.get(name, "")] for name, field in fields.items()]
    return _table(("setting", "default", "allowed", "meaning"), rows)


def _default_and_range(field: griffe.Attribute) -> tuple[str, str]:
    call = ast.parse(str(field.value), mode="eval").body
    if not isinstance(call, ast.Call):
        return f"`{ast.unparse(call)}`", ""
    words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    default = f"`{ast.unparse(call.args[0])}`" if call.args else "must be given"
    if ast.unparse(call.func) == "choice":
        return default, _options(call.args[1], field)
    least = words.get("least", "0" if ast.unparse(call.func) == "integer" else None)
    bounds = ((">", words.get("above")), ("≥", least), ("≤", words.get("most")), ("<", words.get("below")))
    parts = [f"{sign} {_constant(bound, field)}" for sign, bound in bounds if bound is not None]
    return default, " and ".join(parts) or "a number"


def _options(options: ast.expr, field: griffe.Attribute) -> str:
    """Return the values of a choice where the source names them plainly."""
    found = options
    while isinstance(found, ast.Name):
        found = ast.parse(_constant(found.id, field), mode="eval").body
        if isinstance(found, ast.Name) and found.id == getattr(options, "id", None):
            return ""
    items = found.keys if isinstance(found, ast.Dict) else getattr(found, "elts", [])
    return ", ".join(f"`{ast.unparse(item)}`" for item in items if isinstance(item, ast.Constant))


def _constant(name: str, field: griffe.Attribute) -> str:
    """Return what a module's constant is, or the text itself where it is no name."""
    try:
        found = field.resolve(name)
        return str(_package().modules_collection[found].value)
    except (griffe.NameResolutionError, KeyError, AttributeError):
        return name


@cache
def _package() -> griffe.Module:
    found = griffe.load("mlxkv", search_paths=[ROOT], docstring_parser="numpy")
    assert isinstance(found, griffe.Module)
    return found


def _config_class(method: str) -> griffe.Class:
    name = method.replace("-", "_")
    for folder in ("live.methods", "codec.methods"):
        if name in _package()[folder].members:
            classes = _package()[f"{folder}.{name}"].classes.values()
            return next(found for found in classes if found.name.lower() == f"{name.replace('_', '')}config")
    raise LookupError(f"no method {method}")


def presets_table(method: str) -> str:
    """Return a table of a method's presets."""
    rows = []
    for path in sorted((ROOT / "presets/methods").glob("*.toml")):
        preset = tomllib.loads(path.read_text(encoding="utf-8"))
        if preset["method"] == method:
            rows.append([f"`{path.stem}`", preset["description"]])
    return _table(("preset", "description"), rows)

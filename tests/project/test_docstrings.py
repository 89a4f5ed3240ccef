"""Public names say what they take, return and raise, in sections that a parser finds."""

from pathlib import Path

import griffe
import pytest

PACKAGE = Path(__file__).parents[2] / "mlxkv"
# Commands explain themselves in --help; what is private or only read by other tests needs a line at most.
OUTSIDE = ("mlxkv.cli", "mlxkv.__main__", "mlxkv._deprecated")
SELF = ("self", "cls")


@pytest.fixture(scope="module")
def package():
    return griffe.load("mlxkv", search_paths=[PACKAGE.parent], docstring_parser="numpy", resolve_aliases=False)


def functions(parent, bases=()):
    """Every public function of a module, and every public method that no base class documents."""
    for name, member in parent.members.items():
        if member.is_alias or name.startswith("_") or member.path.startswith(OUTSIDE):
            continue
        if member.is_function and name not in bases:
            yield member
        elif member.is_class:
            yield from functions(member, inherited(member))
        elif member.is_module:
            yield from functions(member)


def inherited(kind):
    """Names of methods that a class takes over from its bases in this package."""
    names = set()
    for base in kind.bases:
        text = str(base).split("[")[0]
        try:
            found = kind.resolve(text.split(".")[0])
            target = kind.modules_collection[".".join([found, *text.split(".")[1:]])]
        except (griffe.NameResolutionError, KeyError):
            continue
        if target.is_alias:
            target = target.final_target
        names |= set(target.members) | inherited(target)
    return names


def sections(member):
    parsed = member.docstring.parse("numpy", warnings=False) if member.docstring else []
    return {section.kind.value: section.value for section in parsed}


def problems(member):
    """What a function's docstring lacks."""
    found = sections(member)
    taken = [p.name.lstrip("*") for p in member.parameters if p.name not in SELF]
    said = {name.strip().lstrip("*") for item in found.get("parameters", ()) for name in item.name.split(",")}
    if missing := [name for name in taken if name not in said]:
        yield f"{member.path}: no Parameters for {', '.join(missing)}"
    is_property = "property" in member.labels
    returns = str(member.returns or "None")
    if returns not in ("None", "Never") and not is_property and not {"returns", "yields"} & set(found):
        yield f"{member.path}: no Returns"
    if "raise " in member.source.split('"""')[-1] and "raises" not in found:
        yield f"{member.path}: no Raises"


def test_every_public_function_has_its_sections(package):
    found = [problem for member in functions(package) for problem in problems(member)]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def test_there_are_functions_to_look_at(package):
    assert len(list(functions(package))) > 200


def test_a_function_without_sections_is_found():
    code = 'def f(a: int, *rest: int) -> int:\n    """Do."""\n    raise ValueError\n'
    with griffe.temporary_visited_module(code) as module:
        assert [text.split(": ")[1] for text in problems(module["f"])] == [
            "no Parameters for a, rest",
            "no Returns",
            "no Raises",
        ]

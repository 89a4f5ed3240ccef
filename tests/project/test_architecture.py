"""Imports go one way: CONTRIBUTING's table of rooms is held against the code, room by room and file by file."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlxkv"
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path not in (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
)
MOST_FLOORS, MOST_ROOMS, LONGEST_FILE = 12, 30, 480


def rooms_of_the_table():
    """Rooms by name, each with the rooms it may import, as CONTRIBUTING.md says."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+)` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    return {
        name.removesuffix("/").removesuffix(".py"): set(re.findall(r"\w+", may)) - {"nothing"} for name, may in rows
    }


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in SOURCES}


@cache
def imported(path, at_once=False):
    """Modules of this package that a file imports; at_once: when it is imported itself, and not later or for types."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if at_once:
        for node in ast.walk(tree):
            later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if later or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
                skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "mlxkv"
            and id(node) not in skipped
        ):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found - {"mlxkv"}


def imported_rooms(path):
    return {name.split(".")[1] for name in imported(path)} - {room(path)}


def test_the_table_of_rooms_names_every_room_and_no_other():
    assert set(rooms_of_the_table()) == {room(path) for path in SOURCES}


def test_there_are_no_more_rooms_than_a_newcomer_can_take_in():
    rooms = [
        path
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").exists())
    ]
    assert len(rooms) <= MOST_ROOMS, sorted(path.name for path in rooms)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    beyond = imported_rooms(path) - rooms_of_the_table()[room(path)]
    assert not beyond, f"{room(path)} may not import {beyond}"


def test_rooms_have_floors_and_no_circles():
    floors = {}
    for name in TopologicalSorter(rooms_of_the_table()).static_order():
        floors[name] = 1 + max((floors[below] for below in rooms_of_the_table()[name]), default=0)
    assert max(floors.values()) < MOST_FLOORS  # __main__ is the last


def test_what_one_looks_for_is_where_contributing_says():
    part = (ROOT / "CONTRIBUTING.md").read_text().split("### Looking for")[1].split("## Add")[0]
    for row in re.findall(r"^\| [^|]+ \| ([^|]+) \| ([^|]*) \|$", part, re.MULTILINE)[1:]:
        paths = [ROOT / path for path in re.findall(r"`(mlxkv/[^`]+\.py)`", row[0])]
        assert paths or set(row[0]) == {"-"}
        code = "".join(path.read_text() for path in paths)
        for name in re.findall(r"`([^`]+)`", row[1]):
            assert re.search(rf"^\s*(def |class |){name.split('.')[-1]}\b", code, re.MULTILINE), (row, name)


def test_every_import_that_the_table_allows_is_made():
    made = {name: set() for name in rooms_of_the_table()}
    for path in SOURCES:
        made[room(path)] |= imported_rooms(path)
    assert {name: may - made[name] for name, may in rooms_of_the_table().items() if may - made[name]} == {}


def test_no_files_import_each_other_in_a_circle():
    graph = {name: imported(path, at_once=True) & set(MODULES) for name, path in MODULES.items()}
    # A package's __init__ hands names on: who imports the package imports what it hands on.
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["mlxkv", "benchmarks", "tests"])
def test_files_stay_short(folder):
    long = {
        path.name: n
        for path in (ROOT / folder).rglob("*.py")
        if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


def test_only_the_command_line_prints():
    for path in SOURCES:
        if room(path) != "cli":
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def loaded_by(code, *names):
    """Which of the modules, or of the packages, that begin so are loaded after some code."""
    code = f"import sys\n{code}\nprint(sorted(m for m in sys.modules if m.startswith({names})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import mlxkv", "numpy", "mlx.core", "mlx_lm", "typer") == "[]"


def test_help_loads_no_model_library():
    code = "from mlxkv.cli import main\ntry: main(['dump', '--help'])\nexcept SystemExit: pass"
    assert loaded_by(code, "mlx_lm", "transformers", "mlx.core") == "[]"


def test_live_caches_load_no_codec():
    assert loaded_by("import mlxkv.live", "mlxkv.codec", "mlxkv.evaluate", "mlxkv.cli") == "[]"


def test_every_public_name_can_be_imported():
    import mlxkv

    for name in mlxkv.__all__:
        assert getattr(mlxkv, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mlxkv.nonsense


def test_the_version_is_one():
    import mlxkv

    citation = (ROOT / "CITATION.cff").read_text().replace('"', "")
    assert re.findall(r"^version: (\S+)", citation, re.MULTILINE) == [mlxkv.__version__]

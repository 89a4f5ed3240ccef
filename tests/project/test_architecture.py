import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlxkv"
# Lower floors first; a room may import itself and lower floors.
FLOORS = [
    {"errors", "blas", "registry"},
    {"cache", "metrics", "resources"},
    {"kernels"},
    {"files", "models", "lossless", "sketches", "clustering"},
    {"container"},
    {"codec", "miniatures", "smollm2"},
    {"lm", "presets"},
    {"live", "sensitivity"},
    {"live_files", "methods", "quant_fidelity"},
    {"evaluate"},
    {"targets"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__")
)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mlxkv":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names if alias.name in FLOOR}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = room(path)
    above = {other for other in imported_rooms(path) if other != own and FLOOR[other] >= FLOOR[own]}
    assert not above, f"{own} may not import {above}"


@pytest.mark.parametrize("folder", ["mlxkv", "benchmarks", "tests"])
def test_files_stay_under_300_lines(folder):
    long = {path.name: n for path in (ROOT / folder).rglob("*.py") if (n := len(path.read_text().splitlines())) > 300}
    assert not long


def test_only_the_command_line_prints():
    for path in SOURCES:
        if room(path) != "cli":
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"], path


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, mlxkv; print([m for m in ('numpy', 'mlx.core', 'mlx_lm', 'typer') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_help_loads_no_model_library():
    code = "import sys\nfrom mlxkv.cli import main\ntry: main(['dump', '--help'])\nexcept SystemExit: pass\nprint([m for m in ('mlx_lm', 'transformers', 'mlx.core') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        .stdout.strip()
        .endswith("[]")
    )


def test_every_public_name_can_be_imported():
    import mlxkv

    for name in mlxkv.__all__:
        assert getattr(mlxkv, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mlxkv.nonsense

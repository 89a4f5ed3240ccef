"""Every body in metal_kernels/ is declared once, in the module that it is named after."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from metal_host.static_checks import StaticError, check_declarations

import mlxkv.kernels
from mlxkv.kernels.metal import Kernel

BODIES = {path.stem for path in (Path(__file__).parents[2] / "metal_kernels").glob("*.metal")} - {"common"}
DECLARED = {
    info.name: [
        value for value in vars(import_module(f"mlxkv.kernels.{info.name}")).values() if isinstance(value, Kernel)
    ]
    for info in iter_modules(mlxkv.kernels.__path__)
}


def test_each_body_is_declared_once_by_the_module_it_is_named_after():
    assert BODIES
    check_declarations(DECLARED, BODIES)


def kernels(*names):
    return [Kernel(name, ("x",), ("y",)) for name in names]


@pytest.mark.parametrize(
    ("modules", "bodies", "message"),
    [
        ({"rows": kernels("rows")}, {"rows", "forgotten"}, r"forgotten\.metal:1: declared by no module"),
        ({"rows": kernels("rows", "rows_back")}, {"rows"}, r"rows_back\.metal:1: .* no such file"),
        ({"rows": kernels("groups")}, {"groups"}, r"groups\.metal:1: .*rows\.py, which its name"),
        ({"rows": kernels("rows", "rows")}, {"rows"}, r"rows\.metal:1: .* expected exactly one"),
        ({"rows": kernels("rows_a"), "rows_a": kernels("rows_a")}, {"rows_a"}, "expected exactly one"),
    ],
)
def test_a_wrong_declaration_is_found(modules, bodies, message):
    with pytest.raises(StaticError, match=message):
        check_declarations(modules, bodies)

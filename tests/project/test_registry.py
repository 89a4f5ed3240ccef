"""Registries take our own files first, and nothing that packages outside do can take them along."""

import subprocess
import sys

import pytest

from mlxkv.cli._commands import commands
from mlxkv.codec.methods import codec_methods
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.errors import InputError
from mlxkv.evaluate import evaluations
from mlxkv.live import live_methods
from mlxkv.models import adapters
from mlxkv.registry import Registry

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "registry", [commands, codec_methods, evaluations, live_methods, adapters], ids=lambda r: r.kind
)
def test_something_of_another_kind_is_refused(registry):
    before = registry.names()
    with pytest.raises(InputError):
        registry.register("three")(3)
    assert registry.names() == before


def test_a_folder_that_cannot_be_imported_is_tried_again():
    registry = Registry("thing", "mlxkv.nowhere")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError):
            registry.names()


PACKAGE = """
from mlxkv.live import live_methods
from mlxkv.live.methods.h2o import H2OCache

@live_methods.register("int8")
class Mine(H2OCache):
    pass
"""


@pytest.mark.parametrize("first", ["mlxkv.codec.methods:codec_methods", "mlxkv.live:live_methods"])
def test_a_package_cannot_take_a_name_of_ours_whoever_is_loaded_first(first, tmp_path):
    for name, code in (("taking", PACKAGE), ("ending", "import sys; sys.exit('no')")):
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[mlxkv.methods]\n{name} = {name}\n")
    module, _, registry = first.partition(":")
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from {module} import {registry}
{registry}.names()
from mlxkv.live import live_methods
assert len(live_methods.names()) == 13, live_methods.names()
assert live_methods.get("int8").__module__ == "mlxkv.live.methods.int8"
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "taking of group mlxkv.methods is left out" in done.stderr
    assert "two live methods" in done.stderr
    assert "ending of group mlxkv.methods is left out: SystemExit('no')" in done.stderr


def test_settings_are_written_in_the_order_that_artifacts_have_always_had():
    order = ["compression_ratio", "rank", "max_bit_budget", "samples_per_file", "s", "seed"]
    assert list(KVTCConfig(8).to_dict()) == order
    assert list(KVTCRDConfig().to_dict()) == ["basis_bytes", "samples_per_file", "s", "seed"]

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_carries_presets_and_kernels_and_finds_them(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("mlxkv-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        assert not [name for name in archive.namelist() if name.startswith(("tests/", "benchmarks/"))]
    code = "from mlxkv.bundled.resources import resource_dir; from mlxkv.presets import preset_names; print(resource_dir('metal_kernels')); print(preset_names('models'))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=site, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert Path(found[0]) == site / "mlxkv" / "metal_kernels"
    assert "'glm'" in found[1]
    assert (site / "mlxkv" / "py.typed").is_file()
    texts = [path.relative_to(ROOT) for path in (ROOT / "mlxkv" / "bundled" / "corpus").rglob("*") if path.is_file()]
    assert texts
    assert [path for path in texts if not (site / path).is_file()] == []

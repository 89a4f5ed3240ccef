"""A live method in a package of its own: examples/mlxkv-example-method, installed as a user would, is taken everywhere."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import tiny_model

import mlxkv
from mlxkv.errors import FormatError
from mlxkv.live import live_methods

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "mlxkv-example-method"
SHARED = ["test_methods.py", "test_methods_model.py", "test_live_files.py", "test_live_memory.py"]


def python(site, *words, **variables):
    """Run Python with the packages in `site` installed; returns what has become of it."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", **variables}
    return subprocess.run([sys.executable, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True)


def command(site, *words):
    """What an mlxkv command prints."""
    done = python(site, "-m", "mlxkv", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the example package, installed without network."""
    target = tmp_path_factory.mktemp("site")
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = python(target, *pip, "--disable-pip-version-check", "--target", target, PACKAGE)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_caches_are_made_saved_and_loaded_and_the_shared_tests_take_the_method(site, tmp_path):
    files = [Path(__file__).with_name(name) for name in ["plugin_checks.py", *SHARED]]
    words = ["-p", "no:cacheprovider", "-k", "every_other or every-other", f"--junitxml={tmp_path / 'report.xml'}"]
    saved = tmp_path / "cache"
    done = python(site, "-m", "pytest", *words, *files, MLXKV_PLUGIN_CACHE=str(saved), MLXKV_STEPS="1000")
    assert done.returncode == 0, done.stdout
    cases = list(ElementTree.parse(tmp_path / "report.xml").iter("testcase"))
    ran = {case.get("classname").rpartition(".")[2] for case in cases if case.find("skipped") is None}
    assert ran == {file.stem for file in files}
    assert len(cases) > 20

    assert "every-other" not in live_methods.names()
    with pytest.raises(FormatError, match="method 'every-other', which is not installed here"):
        mlxkv.load_cache(saved, tiny_model("llama"))


@pytest.mark.slow
def test_commands_list_and_evaluate_the_method(site, model_dir):
    (row,) = [row for row in command(site, "presets", "--json") if row["preset"] == "every-other"]
    assert (row["option"], row["method"]) == ("--cache", "every-other")
    assert row["settings"] == {"sinks": 4, "recent": 128, "step": 2}
    assert row["description"].startswith("Every other: the first tokens")
    words = ["--cache", "every-other", "--context-tokens", "200", "--eval-tokens", "20", "--samples", "1"]
    rows = command(site, "eval", "fidelity", "--model", model_dir, *words, "--json")
    assert "every-other" in json.dumps(rows)


def broken(site, code, name="broken"):
    """Install a package whose module is this code."""
    (site / f"{name}_method.py").write_text(textwrap.dedent(code))
    info = site / f"{name}_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mlxkv.methods]\n{name} = {name}_method\n")


REGISTER = "from mlxkv.live import live_methods, LayerCache\nfrom mlxkv.live.methods.int8 import Int8Cache\n"


BROKEN = {
    "dividing": ("1 / 0", "ZeroDivisionError"),
    "missing": ("import nothing_of_this_name", "ModuleNotFoundError"),
    "foreign": (REGISTER + "live_methods.register('broken')(int)", "no subclass of mlxkv.live.LayerCache"),
    "bare": (
        REGISTER + "@live_methods.register('broken')\nclass Broken(LayerCache): ...",
        "Broken needs a config_class",
    ),
    "taking": (
        REGISTER + "@live_methods.register('int8')\nclass Mine(Int8Cache): ...",
        "two live methods of the name 'int8'",
    ),
}


def test_each_broken_package_is_left_out_with_a_warning(tmp_path):
    for name, (code, _) in BROKEN.items():
        broken(tmp_path, code, name)
    done = python(tmp_path, "-c", "import mlxkv.live as live; print(*live.live_methods.names())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == live_methods.names()
    for name, (_, reason) in BROKEN.items():
        (line,) = [line for line in done.stderr.splitlines() if f"{name}_method of group mlxkv.methods" in line]
        assert "RuntimeWarning" in line
        assert "is left out" in line
        assert reason in line


def test_two_methods_may_have_the_same_settings_and_differ_by_name(tmp_path):
    broken(tmp_path, REGISTER + "@live_methods.register('mine')\nclass Mine(Int8Cache): ...")
    code = """
        import sys
        sys.path.insert(0, "tests")
        from conftest import tiny_model
        import mlxkv
        from mlxkv.live import live_config
        model = tiny_model("llama")
        for name in ("int8", "mine"):
            caches = mlxkv.make_cache(model, name)
            mlxkv.save_cache(sys.argv[1], model, caches)
            print(caches[0].method_name, mlxkv.load_cache(sys.argv[1], model)[0].method_name)
        try:
            mlxkv.make_cache(model, live_config("int8"))
        except mlxkv.MlxkvError as error:
            print(error)
    """
    done = python(tmp_path, "-c", textwrap.dedent(code), tmp_path / "cache")
    assert done.stdout.splitlines() == [
        "int8 int8",
        "mine mine",
        "Int8Config(keys_by_channel=True) could be of int8 or mine: name the method instead",
    ]

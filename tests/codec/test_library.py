"""Artifacts in the user's data folder: found by model, kept beside each other, and skipped where they are damaged."""

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlxkv import CalibrationArtifacts
from mlxkv.codec import library
from mlxkv.errors import ChecksumError, FormatError, InputError, LibraryWarning, MismatchError, WeakFingerprintWarning

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = {name: CalibrationArtifacts.from_dir(FIXTURES / name / "artifacts") for name in ("golden", "golden_rd")}


def of(model, name="golden", **arrays):
    """Artifacts of a fixture, as if they were learnt from this model."""
    found = GOLDEN[name]
    k = replace(found.k, mu=found.k.mu + arrays["shift"]) if arrays else found.k
    return replace(found, k=k, meta={**found.meta, "model_fingerprint": model})


@pytest.fixture
def home():
    """An empty library, which does not exist yet."""
    return library.home()


def made(folder, seconds):
    """Set when an entry was added."""
    os.utime(folder / "meta.json", (seconds, seconds))
    return folder


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MLXKV_ARTIFACTS": "/a", "MLXKV_HOME": "/b"}, "/a"),
        ({"MLXKV_HOME": "/b"}, "/b/artifacts"),
        ({"XDG_DATA_HOME": "/c"} if sys.platform == "linux" else {}, ".*/mlxkv/artifacts"),
    ],
)
def test_the_library_is_where_the_user_says_or_among_the_data_of_the_user(variables, expected, monkeypatch):
    for name in ("MLXKV_ARTIFACTS", "MLXKV_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Path(expected) == library.home() or library.home().match("mlxkv/artifacts")


def test_where_there_is_no_library_nothing_is_found_and_none_is_made(home):
    assert library.find("f00d") is None
    assert library.items() == []
    assert not home.exists()


def test_what_is_added_is_found_by_its_model_alone(home):
    assert library.add(of("a.1")) == home / of("a.1").fingerprint
    assert library.find("a.1").fingerprint == GOLDEN["golden"].fingerprint
    assert library.find("b.1") is None
    assert library.find("a.1", "kvtc-rd") is None
    assert stat.S_IMODE(home.stat().st_mode) == 0o700

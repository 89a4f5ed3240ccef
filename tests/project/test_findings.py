"""Findings have the form that their README asks for. They need a network, so here they are read and not run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "findings"
FINDINGS = sorted(FOLDER.glob("*.sh"))


def test_findings_are_listed_once_each():
    rows = re.findall(r"^\| `(\w+)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert rows == [path.stem for path in FINDINGS]


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_findings_have_their_form(path):
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert 'temp=$(mktemp -d)\ntrap \'rm -rf "$temp"\' EXIT\ncd "$temp"' in text
    assert "The behaviour has changed" in text
    assert "As described." in text
    assert not re.search(r"install\b.*\bmlxkv|import mlxkv", text)
    subprocess.run(["bash", "-n", path], check=True)
    code = re.search(r"<<'PYTHON'\n(.*)^PYTHON$", text, re.DOTALL | re.MULTILINE)
    assert code
    compile(code[1], path.name, "exec")


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.stem)
def test_findings_pin_what_they_install(path):
    lines = re.findall(r"pip install (.*)$", path.read_text(), re.MULTILINE)
    pins = [word for line in lines for word in line.split() if not word.startswith("-")]
    assert pins
    assert all(word == '"$mlx"' or re.search(r"==\d[\d.]*$", word) for word in pins)
    assert all("==" in pin for pin in re.findall(r'^\s*mlx="(.*)"$', path.read_text(), re.MULTILINE))

import re
import shlex
from pathlib import Path

import pytest
from test_plans import problem

from mlxkv import calibrate, lm, write_dump
from mlxkv.cli import main
from mlxkv.codec.methods.kvtc import KVTCConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROSE = "A cache that forgets nothing is a memory; one that forgets the right things is an understanding. "


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def block(language, word):
    """The only block with this word in it."""
    (found,) = [block for block in blocks(language) if word in block]
    return found


def shorter(script):
    assert "max_tokens=40" in script
    return script.replace("max_tokens=40", "max_tokens=12")


def test_the_commands_run_as_written(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.txt").write_text(PROSE * (8 + ord(name) % 3))
    lines = block("", "mlxkv dump").splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("mlxkv ")]
    assert [command[0] for command in commands] == [
        "dump",
        "dump",
        "calibrate",
        "compress",
        "generate",
        "decompress",
        "eval",
        "generate",
    ]
    for command in commands:
        here = {"mlx-community/Qwen3-4B-4bit": str(model_dir)}
        words = [here.get(word, word) for word in command]
        with pytest.raises(SystemExit) as exit_info:
            main(words)
        assert not exit_info.value.code, command
    assert Path("restored.npz").stat().st_size > Path("a.mlxkv").stat().st_size


def test_the_evaluations_named_exist_with_their_options():
    lines = block("", "mlxkv eval needle").splitlines()
    assert [problem(line) for line in lines] == [None, None]


def test_the_python_example_runs_as_written_with_fewer_tokens(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = smollm2
    Path("notes.txt").write_text(PROSE * 10)
    write_dump("c.npz", lm.dump(model, tokenizer.encode(PROSE[::2] * 4)))
    calibrate(["c.npz"], KVTCConfig(8)).save("artifacts")
    exec(shorter(block("python", "KVTCCacheCodec")), {})
    assert Path("notes.mlxkv").stat().st_size > 0
    assert len(capsys.readouterr().out.strip()) > 10


def test_the_live_example_runs_as_written_with_fewer_tokens(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = block("python", "save_cache")
    assert len([line for line in script.splitlines() if line]) == 10
    exec(shorter(script), {})
    first, size, second = re.split(r"^(\d+) bytes$", capsys.readouterr().out, flags=re.MULTILINE)
    assert min(len(first), len(second)) > 30
    tokens = 4 + 12 + 5  # the prompt, what is generated, and some room
    assert 0 < int(size) <= tokens * 30 * 2 * 3 * 64 * 2
    assert Path("story.cache").stat().st_size > int(size)


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"

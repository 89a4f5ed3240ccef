"""README and docs run as written, and their numbers are those of the committed results."""

import json
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from test_plans import problem

from benchmarks.experiments import batching, decode_speed, store
from mlxkv import KVTCRDConfig, calibrate, lm, write_dump
from mlxkv.cli import main
from mlxkv.sensitivity import sensitivity

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *(path for path in (ROOT / "docs").rglob("*.md") if path.name not in ("plans.md", "lab-notes.md")),
]
PROSE = "A cache that forgets nothing is a memory; one that forgets the right things is an understanding. "


def blocks(text, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for named, block in fenced if named == language]


def block(text, language, word):
    """The first block with this word in it."""
    return next(block for block in blocks(text, language) if word in block)


def shorter(script):
    assert re.search(r"max_tokens=(40|200)\b", script)
    return re.sub(r"max_tokens=\d+", "max_tokens=12", script)


# What keeps a command small, after its own words.
SMALLER = {
    "calibrate": ["--text", "notes.txt", "--budget-minutes", "0.05"],
    "chat": ["--max-tokens", "8"],
    "generate": ["--max-tokens", "8"],
    "eval": ["--samples", "1", "--context-tokens", "100", "--eval-tokens", "20"],
}


def test_the_commands_run_as_written(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", StringIO("Hello.\n"))
    Path("notes.txt").write_text(PROSE * 10)
    lines = [*block(README, "", "mlxkv chat").splitlines(), *block(README, "", "mlxkv eval").splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mlxkv ")]
    first = ["chat", "plan", "compress", "calibrate", "compress", "generate", "convert", "generate", "eval"]
    assert [command[0] for command in commands] == first
    sizes = []
    for command in commands:
        here = dict.fromkeys(("smollm2-135m", "mlx-community/Qwen3-4B-4bit"), str(model_dir))
        with pytest.raises(SystemExit) as exit_info:
            main([*(here.get(word, word) for word in command), *SMALLER.get(command[0], [])])
        assert not exit_info.value.code, command
        sizes += [Path("notes.mlxkv").stat().st_size] if command[0] == "compress" else []
    assert sizes[1] < sizes[0], "a calibration makes files smaller"
    assert "<svg" in Path("fidelity.html").read_text()


@pytest.fixture
def loaded(smollm2, monkeypatch):
    """What `lm.load` gives an example: the model that is loaded already, by the same function and name."""
    monkeypatch.setattr(lm, "load", {"smollm2-135m": smollm2}.__getitem__)
    return smollm2


@pytest.mark.slow
def test_the_python_example_runs_as_written_with_fewer_tokens(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = block(README, "python", "mlxkv.Session")
    assert len([line for line in script.splitlines() if line]) == 10
    exec(shorter(script), {})
    said, size, _ = re.split(r"^(\d+) bytes$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(said) > 60
    tokens = 4 + 12 + 5  # the prompt, what is generated, and some room
    assert 0 < int(size) <= tokens * 30 * 2 * 3 * 64 * 2
    assert Path("work.mlxkv").stat().st_size > 0


@pytest.mark.slow
def test_the_files_example_runs_as_written_with_fewer_tokens(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded
    Path("notes.txt").write_text(PROSE * 10)
    tokens = tokenizer.encode(PROSE[::2] * 4)
    dump = lm.dump(model, tokens)
    dump.sensitivity = sensitivity(model, tokens)
    write_dump("c.npz", dump)
    calibrate(["c.npz"], KVTCRDConfig(basis_bytes=4_000_000)).save("artifacts")
    exec(shorter(block((ROOT / "docs/files.md").read_text(), "python", "CacheCodec")), {})
    assert Path("notes.mlxkv").stat().st_size > 0
    assert len(capsys.readouterr().out.strip()) > 10


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    cells = json.loads((ROOT / "docs/write-your-own-method.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def commands_of(page):
    """Every command line of a page that stands in a block of its own, without those that are continued."""
    lines = [line for text in blocks(page.read_text(), "") for line in text.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0] for line in lines if line.startswith("mlxkv ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_on_a_page_exists_with_its_options(page):
    wrong = {line: found for line in commands_of(page) if (found := problem(line))}
    assert not wrong


def result(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["summary"]


def rows_of(table_after):
    """The cells of the README's first table behind a heading, by what stands in backticks."""
    part = README.split(f"## {table_after}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {key[0]: cells for cells in rows if (key := re.findall(r"`([^`]+)`", " ".join(cells)))}


def said(value):
    """A number as README writes it, or as close."""
    return float(value.replace("%", "").replace(",", ""))


def test_what_to_use_has_the_measured_numbers():
    measured = {row["variant"]: row for row in result("live_methods")["fidelity"] if row["model"] == "smollm2-135m"}
    measured |= {row["variant"]: row for row in result("kv_bits")}
    rows = rows_of("Which should I use?")
    assert set(rows) == {"int8", "smartkv-0.3", "int4", "h2o-256", "direct", "kvtc-rd"}
    for name in set(rows) - {"direct", "kvtc-rd"}:
        assert said(rows[name][2]) == pytest.approx(measured[name]["share_of_fp16"], abs=0.006), name
        assert said(rows[name][3]) == pytest.approx(measured[name]["kl"], rel=0.06), name
    (filed,) = [row for row in result("rate_distortion")["long"]["kvtc-rd"] if row["at"] == 38]
    assert said(rows["kvtc-rd"][2]) == pytest.approx(filed["cache_bytes"] / filed["fp16_bytes"], abs=0.001)
    assert said(rows["kvtc-rd"][3]) == pytest.approx(filed["kl"], rel=0.06)


def test_what_to_use_has_the_numbers_of_the_second_model_beside_those_of_the_first():
    measured = {row["variant"]: row for row in result("live_methods_gemma")["fidelity"]}
    rows = rows_of("Which should I use?")
    for name in ("int8", "int4"):
        assert said(rows[name][4]) == pytest.approx(measured[name]["share_of_fp16"], abs=0.006), name
        assert said(rows[name][5]) == pytest.approx(measured[name]["kl"], rel=0.06), name
    for name in ("smartkv-0.3", "h2o-256"):
        assert rows[name][4:] == ["-", "-"], "windows stay as they are, and are most of that cache"
    (filed,) = [row for row in result("rate_distortion_gemma")["long"]["kvtc-rd"] if row["at"] == 38]
    assert said(rows["kvtc-rd"][4]) == pytest.approx(filed["cache_bytes"] / filed["fp16_bytes"], abs=0.001)
    assert said(rows["kvtc-rd"][5]) == pytest.approx(filed["kl"], rel=0.06)


@pytest.mark.parametrize(("name", "first"), [("uncalibrated", 2), ("uncalibrated_gemma", 4)])
def test_what_to_use_has_the_numbers_of_files_without_calibration(name, first):
    (filed,) = [row for row in result(name) if row["variant"] == "direct 45"]
    cells = rows_of("Which should I use?")["direct"]
    assert said(cells[first]) == pytest.approx(filed["share_of_fp16"], abs=0.006)
    assert said(cells[first + 1]) == pytest.approx(filed["kl"], rel=0.06)


def test_what_three_minutes_of_calibration_give_is_measured():
    summary = result("one_command")
    (row,) = [row for row in summary["rows"] if row["quality"] == 35]
    said_so = f"{row['ratio']:.1f} times smaller at KL {row['kl']:.4f}"
    assert said_so in " ".join(README.split())
    assert round(summary["calibrate_seconds"] / 60) == 3


def test_prompts_that_survive_have_the_measured_numbers():
    found = json.loads((ROOT / "benchmarks" / "results" / "store.json").read_text())
    assert store.brief(found) in " ".join(README.split())


def test_batches_and_decoding_have_the_measured_numbers():
    flowing = " ".join(README.split())
    for experiment, name in ((batching, "batching"), (decode_speed, "decode_speed")):
        assert experiment.brief(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())) in flowing


def test_as_many_model_types_work_as_the_page_of_models_says():
    counts = re.search(r"\*\*(\d+) of (\d+) types restore exactly", (ROOT / "docs" / "models.md").read_text())
    assert f"[{counts[1]} of the {counts[2]} model types]" in " ".join(README.split())


def test_the_comparison_with_mlx_lm_has_the_measured_numbers():
    measured = {row["variant"]: row for row in result("kv_bits")}
    rows = rows_of("Beside `--kv-bits`, and beside doing nothing")
    assert set(rows) == {"mlx-lm --kv-bits 8", "mlx-lm --kv-bits 4", "int8", "int4", "smartkv-0.3"}
    for name, cells in rows.items():
        assert said(cells[1]) == pytest.approx(measured[name]["share_of_fp16"], abs=0.006), name
        assert said(cells[2]) == pytest.approx(measured[name]["kl"], rel=0.06), name
        assert said(cells[3]) == pytest.approx(100 * measured[name]["top1_agreement"], abs=0.06), name


def test_numbers_in_the_text_are_measured():
    assert 36 * 2 * 8 * 128 * 2 == 147_456  # Qwen3-8B: layers, keys and values, heads, dims, bytes
    assert f"{147_456 * 32_768 / 1e9:.1f} GB at 32,768" in README
    shares = {
        row["variant"]: row["share_of_fp16"]
        for row in result("live_methods")["fidelity"]
        if row["model"] == "smollm2-135m"
    }
    for name in ("int8", "smartkv-0.3"):
        assert f"{shares[name] * 147_456 * 32_768 / 1e9:.1f} GB" in README.replace("\n", " ")
    faster = [row["times_faster_than_prefill"] for row in result("codec_speed") if "restore into mlx-lm" in row["step"]]
    assert f"{min(faster)} to {max(faster)} times as fast" in README
    same = {row["variant"]: f"{100 * row['equal_leading_tokens']:.0f} %" for row in result("text")}
    flowing = " ".join(README.split())
    for name, said_so in (("int8", "89 %"), ("smartkv-0.3", "30 %")):
        assert same[name] == said_so
        assert f"{said_so} with `{name}`" in flowing
    rate = result("rate_distortion")["bd_rate"]["kvtc-rd"]
    most, least = (round(-100 * bound) for bound in rate["interval"])
    assert f"{round(-100 * rate['bd_rate'])} % fewer bytes" in README
    assert f"({least} to {most}, rate_distortion.json)" in README


def test_readme_fits_a_screen_or_three():
    assert len(README.splitlines()) <= 135


def test_links_lead_somewhere():
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.md"),
        *ROOT.glob("findings/*.md"),
    ):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            assert target.startswith("http") or (path.parent / target).exists(), f"{path.name}: {target}"

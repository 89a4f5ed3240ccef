"""One command from a text to a file and back, and the artifacts that it finds by itself."""

import io
import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run

from mlxkv import CacheCodec, CalibrationArtifacts, lm, read_dump
from mlxkv.cli import _names
from mlxkv.codec import library

TEXT = "The quick brown fox jumps over the lazy dog. Once upon a time in a land far away, nothing happened. "
HELP_LINES, HELP_WIDTH = 48, 80


@pytest.fixture(scope="module")
def work(model_dir, tmp_path_factory):
    """Texts, the first one's dump, and two calibrations of the model."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "notes.txt").write_text(TEXT * 3)
    (folder / "longer.txt").write_text(TEXT * 9)
    assert run("dump", "--model", model_dir, "--prompt-file", folder / "notes.txt", "--out", folder / "notes.npz") == 0
    for method in ("kvtc-4", "kvtc-8"):
        words = ["--npz", folder / "notes.npz", "--method", method, "--out", folder / method]
        assert run("calibrate", *words) == 0
    return SimpleNamespace(folder=folder, model=model_dir, text=folder / "notes.txt", npz=folder / "notes.npz")


@pytest.fixture
def compress(work, tmp_path, says):
    """Compress the text in one command."""

    def call(*words, text="notes.txt", out="a.mlxkv"):
        source = ["--model", work.model, "--prompt-file", work.folder / text]
        return says("compress", *source, "--out", tmp_path / out, *words)

    return call


def ids():
    return [item.fingerprint for item in library.items()]


def test_a_text_becomes_a_file_in_one_command_and_comes_back_in_another(work, tmp_path, compress, says, monkeypatch):
    monkeypatch.setattr("mlxkv.lm.extraction.model_fingerprint", None)  # which reads all weights, is known already
    facts = compress()
    assert (facts["method"], facts["tokens"]) == ("direct", len(TEXT) * 3)
    assert facts["ratio"] > 1
    says("decompress", tmp_path / "a.mlxkv", "--out", tmp_path / "a.npz")
    back, dump = read_dump(tmp_path / "a.npz"), read_dump(work.npz)
    assert back.tokens.tolist() == dump.tokens.tolist()
    assert 0 < np.square(back.k - dump.k).sum() < 0.02 * np.square(dump.k).sum()
    assert ids() == []


@pytest.mark.parametrize("method", ["exact", "direct", "kvtc"])
def test_a_text_and_its_dump_become_the_same_file(method, work, tmp_path, compress, says):
    library.import_folder(work.folder / "kvtc-4")
    facts = compress("--method", method)
    assert facts["method"] == method
    says("compress", "--npz", work.npz, "--method", method, "--out", tmp_path / "b.mlxkv")
    assert (tmp_path / "a.mlxkv").read_bytes() == (tmp_path / "b.mlxkv").read_bytes()
    says("decompress", tmp_path / "a.mlxkv", "--out", tmp_path / "a.npz")
    assert np.array_equal(read_dump(tmp_path / "a.npz").k, read_dump(work.npz).k) == (method == "exact")


def test_without_a_calibration_a_note_says_what_one_would_give(work, tmp_path, compress, capsys):
    said = []
    for words in ([], ["--method", "direct"], ["--artifacts", work.folder / "kvtc-4"]):
        capsys.readouterr()
        assert run("compress", "--npz", work.npz, "--out", tmp_path / "a.mlxkv", *words) == 0
        said.append(" ".join(capsys.readouterr().err.split()))
    assert f"mlxkv calibrate --model {work.model}" in said[0]
    assert said[1:] == ["", ""]


def test_a_calibration_is_used_from_then_on_and_older_files_stay_readable(work, tmp_path, compress, says):
    makes = []
    for n, method in enumerate((None, "kvtc-4", "kvtc-8")):
        if method:
            os.utime(library.import_folder(work.folder / method) / "meta.json", (n, n))
        makes.append(compress(out=f"{n}.mlxkv"))
    assert [facts["method"] for facts in makes] == ["direct", "kvtc", "kvtc"]
    assert makes[1]["file_bytes"] > makes[2]["file_bytes"]
    where = [says("inspect", tmp_path / f"{n}.mlxkv")["artifacts_in"] for n in range(3)]
    assert where == ["the file itself", *(str(library.home() / name) for name in reversed(ids()))]
    for n in range(3):
        says("decompress", tmp_path / f"{n}.mlxkv", "--out", tmp_path / f"{n}.npz")


def test_artifacts_that_are_named_are_used_and_no_others(work, tmp_path, compress, says):
    library.import_folder(work.folder / "kvtc-8")
    named = work.folder / "kvtc-4"
    compress("--artifacts", named)
    assert says("inspect", tmp_path / "a.mlxkv")["artifacts"] == CalibrationArtifacts.from_dir(named).fingerprint
    assert says("inspect", tmp_path / "a.mlxkv")["artifacts_in"] is None
    assert run("decompress", tmp_path / "a.mlxkv", "--out", tmp_path / "b") == 4
    says("decompress", tmp_path / "a.mlxkv", "--artifacts", named, "--out", tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("method", "end"), [("exact", ""), ("direct", ""), ("direct", "oops"), ("kvtc", "")], ids=lambda value: value or "-"
)
def test_a_longer_text_is_appended_as_if_it_had_been_compressed_whole(method, end, work, tmp_path, compress):
    library.import_folder(work.folder / "kvtc-4")
    (work.folder / "begun.txt").write_text(TEXT * 6 + end)
    compress("--method", method, text="begun.txt")
    facts = compress("--append", text="longer.txt")
    assert (facts["tokens"], facts["method"]) == (len(TEXT) * 9, method)
    compress("--method", method, text="longer.txt", out="b.mlxkv")
    assert (tmp_path / "a.mlxkv").read_bytes() == (tmp_path / "b.mlxkv").read_bytes()


@pytest.mark.parametrize("other", ["Another text", TEXT, TEXT * 2 + "x" * 99, TEXT * 3 + "x" * 9])
def test_another_text_is_not_appended_and_no_model_runs_for_it(other, work, tmp_path, compress, monkeypatch, capsys):
    (tmp_path / "begun.txt").write_text(TEXT * 3 + "y" * 9)
    compress(text=tmp_path / "begun.txt")
    before = (tmp_path / "a.mlxkv").read_bytes()
    monkeypatch.setattr(lm, "dump", None)
    words = ["--model", work.model, "--prompt", other, "--out", tmp_path / "a.mlxkv", "--append"]
    assert run("compress", *words) == 4
    assert "it is of another text" in capsys.readouterr().err
    assert (tmp_path / "a.mlxkv").read_bytes() == before


@pytest.mark.parametrize("words", [["--artifacts", "{folder}/other"], ["--append"]])
def test_artifacts_of_another_model_are_refused_before_the_model_runs(
    words, work, tmp_path, compress, monkeypatch, capsys
):
    compress()
    found = CalibrationArtifacts.from_dir(work.folder / "kvtc-4")
    replace(found, meta={**found.meta, "model_fingerprint": "a.1"}).save(work.folder / "other", overwrite=True)
    monkeypatch.setattr(lm, "dump", None)
    monkeypatch.setattr(lm, "fingerprint", lambda model: "b.1")
    words = [word.format(folder=work.folder) for word in words]
    source = ["--model", work.model, "--prompt-file", work.text]
    assert run("compress", *source, "--out", tmp_path / "a.mlxkv", *words) == 4
    assert "the cache is of" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "dump"])
def test_a_text_may_come_from_the_standard_input(command, work, tmp_path, says, monkeypatch, capsys):
    for data, code in ((TEXT.encode() * 3, 0), (b"\xff\xfe", 3), (b"", 2)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert run(command, "--model", work.model, "--prompt-file", "-", "--out", tmp_path / "a", "--json") == code
        said = json.loads(capsys.readouterr().out)
        assert code or said["tokens"] == len(TEXT) * 3


@pytest.mark.parametrize(
    ("target", "holds"),
    [
        (["--quality", 60], lambda facts: facts["quality"] == 60),
        (["--target-ratio", 2.5], lambda facts: abs(facts["ratio"] - 2.5) < 0.06),
        (["--target-bytes", 20000], lambda facts: abs(facts["file_bytes"] - 20000) <= 400),
        (["--target-kl", 0.2], lambda facts: facts["quality"] >= 10),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_qualities_and_targets_work_without_a_calibration(target, holds, compress):
    assert holds(compress(*target))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --prompt, --prompt-file and --npz"),
        (["--prompt", "a", "--npz", "{npz}"], "give one of --prompt, --prompt-file and --npz"),
        (["--prompt", "a", "--prompt-file", "{text}", "--model", "{model}"], "either --prompt or --prompt-file"),
        (["--prompt", "a"], "a text needs --model"),
        (["--npz", "{npz}", "--model", "{model}"], "with --npz, --model is for --target-kl"),
        (["--prompt", "", "--model", "{model}"], "the prompt has no tokens"),
        (["--prompt", "a", "--model", "{model}", "--method", "kvtc"], "there are no artifacts of"),
        (["--npz", "{npz}", "--method", "kvtd"], "did you mean kvtc"),
        (["--npz", "{npz}", "--artifacts", "{folder}/kvtc-4", "--method", "exact"], "is of method kvtc, not exact"),
        (["--npz", "{npz}", "--method", "exact", "--quality", "40"], "quality"),
        (["--prompt-file", "{folder}", "--model", "{model}"], "not a regular file"),
    ],
)
def test_mistakes_are_told_before_the_model_runs(words, message, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lm, "dump", None)
    words = [word.format(**vars(work)) for word in words]
    assert run("compress", *words, "--out", tmp_path / "a.mlxkv") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a.mlxkv").exists()


def test_a_text_is_never_written_over(work, capsys):
    before = work.text.read_bytes()
    assert run("compress", "--model", work.model, "--prompt-file", work.text, "--out", work.text) == 2
    assert work.text.read_bytes() == before


def test_ctrl_c_while_the_model_runs_leaves_no_file(work, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "dump", stopped)
    words = ["--model", work.model, "--prompt-file", work.text, "--out", tmp_path / "a.mlxkv"]
    assert run("compress", *words) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith(f"error: interrupted while running the prompt {tmp_path / 'a.mlxkv'} was not written")
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_artifacts_are_elsewhere_is_read_once_they_are_carried_here(
    work, tmp_path, compress, says, monkeypatch, capsys
):
    (fingerprint,) = [says("artifacts", "import", work.folder / "kvtc-4")["id"]]
    compress()
    says("artifacts", "export", fingerprint, "--out", tmp_path / "carried")
    monkeypatch.setenv("MLXKV_ARTIFACTS", str(tmp_path / "other machine"))
    decompress = ["decompress", tmp_path / "a.mlxkv", "--out", tmp_path / "a.npz"]
    assert run(*decompress, "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert str(work.model) in said["error"]
    assert f"mlxkv artifacts export {fingerprint}" in said["hint"]
    assert "mlxkv artifacts import" in said["hint"]
    says("artifacts", "import", tmp_path / "carried")
    says(*decompress)


def test_export_writes_into_nothing_that_is_there_and_advises_only_what_it_can_do(work, tmp_path, says, capsys):
    words = ["artifacts", "export", says("artifacts", "import", work.folder / "kvtc-4")["id"], "--out", tmp_path / "a"]
    says(*words)
    assert run(*words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.endswith("something is in it give a new folder")
    assert "overwrite" not in said


def test_ls_tells_what_there_is(work, says, capsys):
    assert says("artifacts", "ls") == []
    assert run("artifacts", "ls") == 0
    assert "mlxkv calibrate --model MODEL" in capsys.readouterr().err
    for n, name in enumerate(("kvtc-4", "kvtc-8")):
        os.utime(library.import_folder(work.folder / name) / "meta.json", (10 + n, 10 + n))
    rows = says("artifacts", "ls")
    assert [(row["model"], row["method"], row["tokens"]) for row in rows] == [(str(work.model), "kvtc", 296)] * 2
    assert [row["fingerprint"] for row in rows] == ids()
    assert [row["id"] for row in rows] == [name[:8] for name in ids()]
    assert rows[1]["added"] < rows[0]["added"] or rows[1]["added"][:4] in ("1969", "1970")
    (library.home() / ids()[1] / "meta.json").write_text("{")
    assert [bool(row["problem"]) for row in says("artifacts", "ls")].count(True) == 1
    assert run("artifacts", "ls") == 0
    said = capsys.readouterr()
    assert "cannot be used: meta.json is not valid JSON" in said.err
    assert max(map(len, said.out.splitlines())) <= HELP_WIDTH


def test_rm_asks_and_says_what_is_lost(work, says, monkeypatch, capsys):
    found = CalibrationArtifacts.from_dir(work.folder / "kvtc-4")
    library.add(replace(found, meta={**found.meta, "model": "\x1b[31mred"}))
    (name,) = ids()
    assert run("artifacts", "rm", name[:8]) == 2
    assert "can then no longer be read; nothing was removed" in capsys.readouterr().err
    for answer, code, left in (("n", 2, [name]), ("", 2, [name]), ("y", 0, [])):
        typed = io.StringIO(answer + "\n")
        typed.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", typed)
        assert run("artifacts", "rm", name[:8], "--json") == code
        said = capsys.readouterr()
        assert "can then no longer be read" in said.err
        assert "\x1b" not in said.err
        assert json.loads(said.out).get("removed") == (None if code else name)
        assert ids() == left
    library.import_folder(work.folder / "kvtc-4")
    assert says("artifacts", "rm", name, "--yes")["removed"] == name
    assert run("artifacts", "rm", name, "--yes") == 2


def test_ids_are_completed(work):
    assert _names.artifact_ids() == []
    library.import_folder(work.folder / "kvtc-4")
    assert _names.artifact_ids() == [(ids()[0][:8], f"kvtc of {work.model}")]


def test_doctor_says_where_artifacts_are_and_how_many(work, monkeypatch):
    from mlxkv.cli.doctor import _artifacts

    assert (_artifacts()["found"], _artifacts()["status"]) == (f"none in {library.home()}", "missing")
    library.import_folder(work.folder / "kvtc-4")
    assert (_artifacts()["found"], _artifacts()["status"]) == (f"1 in {library.home()}", "ok")
    (library.home() / ids()[0] / "meta.json").unlink()
    assert _artifacts()["status"] == "problem"


@pytest.mark.parametrize(
    "command", ["compress", "decompress", "inspect", "dump", *(f"artifacts {name}" for name in ("", "ls", "rm", "export", "import"))]
)  # fmt: skip
def test_help_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(HELP_WIDTH))
    assert run(*command.split(), "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= HELP_LINES
    assert max(map(len, lines)) <= HELP_WIDTH
    assert "Example: mlxkv" in " ".join(lines)


def test_a_file_is_read_in_python_by_what_it_names(work, tmp_path, compress):
    library.import_folder(work.folder / "kvtc-4")
    compress()
    codec = CacheCodec(library.for_file(tmp_path / "a.mlxkv"))
    assert codec.decompress_dump(tmp_path / "a.mlxkv").length == len(TEXT) * 3

"""The version, completion, and options as they were called before the first release."""

import pytest
from conftest import run

import mlxkv
from mlxkv.cli import build
from mlxkv.cli._arguments import OLD_OPTIONS, with_new_names
from mlxkv.errors import InputError


def test_version_is_the_packages(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"mlxkv {mlxkv.__version__}\n"


def test_completion_can_be_shown_and_installed(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert "--install-completion" in out
    assert "--show-completion" in out


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["compress", "--w", "5", "--s=2"], ["compress", "--recent", "5", "--sinks=2"]),
        (
            ["eval", "fidelity", "--at", "9", "--predict=3"],
            ["eval", "fidelity", "--context-tokens", "9", "--eval-tokens=3"],
        ),
        (["eval", "latency", "--context", "9"], ["eval", "latency", "--context-tokens", "9"]),
        (["generate", "--prompt", "--w"], ["generate", "--prompt", "--w"]),
        (["compress", "--window", "5"], ["compress", "--window", "5"]),
        (["compress", "--out", "--w", "--w", "5"], ["compress", "--out", "--w", "--recent", "5"]),
        (["compress", "--w", "--s"], ["compress", "--recent", "--s"]),
        (["compress", "--append", "--s", "3"], ["compress", "--append", "--sinks", "3"]),
        (["eval", "fidelity", "--model", "--at"], ["eval", "fidelity", "--model", "--at"]),
        (["inspect", "--", "--w"], ["inspect", "--", "--w"]),
    ],
)
def test_old_options_are_read_as_new_ones_but_never_a_value(old, new):
    assert with_new_names(build(), old)[0] == new


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "--recent", "1", "--w", "2"],
        ["compress", "--s=2", "--sinks=3"],
        ["eval", "fidelity", "--at", "9", "--context-tokens", "9"],
        ["eval", "latency", "--context", "9", "--context-tokens", "9"],
    ],
)
def test_an_option_is_not_taken_by_both_its_names(words):
    with pytest.raises(InputError, match="is the old name of"):
        with_new_names(build(), words)


def test_an_old_option_works_and_says_its_new_name(tmp_path, capsys):
    assert (
        run("compress", "--w", "5", "--npz", tmp_path / "none.npz", "--artifacts", tmp_path, "--out", tmp_path / "x")
        == 2
    )
    err = capsys.readouterr().err
    assert err.count("note: --w is called --recent now") == 1
    assert "no calibration artifacts" in err  # so the option itself was taken


def test_every_new_name_is_an_option(capsys):
    for words, options in ((["compress"], OLD_OPTIONS["compress"]), (["eval", "fidelity"], OLD_OPTIONS["eval"])):
        assert run(*words, "--help") == 0
        out = capsys.readouterr().out
        assert all(new in out for new in options.values())
        assert not any(f"{old} " in out for old in options)

"""Chatting in a terminal or through a pipe: what is shown, what is saved, and what a kill or Ctrl-C leaves."""

import io
import os
import pty
import re
import select
import signal
import stat
import sys
import time

import pytest
from conftest import run
from talking import talker_folder, tiny_talker

from mlxkv.cli import _sessions, chat
from mlxkv.session import Session


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A tiny model's folder."""
    return talker_folder(tmp_path_factory.mktemp("talker"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def piped(talker, monkeypatch, capsys):
    """Exit code, answers, and what is said beside them, of a chat through a pipe."""

    def call(lines, *words, model=talker):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = run("chat", "--model", model, "--max-tokens", 5, *words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def typed(talker, monkeypatch, capsys):
    """The same of a chat in a terminal, where lines may also be keys: an exception is what they do."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def call(lines, *words):
        rest = iter(lines)

        def reply(prompt):
            line = next(rest, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", reply)
        code = run("chat", "--model", talker, "--max-tokens", 5, *words)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def expected_answers(questions, **options):
    """What the tiny model answers."""
    session = Session(*tiny_talker(), **options)
    return [session.send(question, max_tokens=5) for question in questions]


def test_each_line_of_a_pipe_is_a_question_and_only_answers_are_on_standard_output(piped, home):
    code, out, err = piped("Hello\n\n//slash\n", "--session", "work")
    answers = expected_answers(["Hello", "/slash"])
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers))
    assert err.count(" tokens · file ") == 2
    assert err.count("uncompressed") == 2
    assert os.listdir(home / "sessions") == ["work.mlxkv"]
    assert stat.S_IMODE((home / "sessions").stat().st_mode) == 0o700
    code, out, err = piped("And?\n", "--session", "work")
    assert re.search(r"work: 2 turns, \d+ tokens, resumed in .* · file .*, uncompressed ", err)


def test_a_session_by_a_path_is_kept_there_and_goes_on(piped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, session in enumerate(["./talk.mlxkv", "talk.mlxkv", tmp_path / "talk.mlxkv"]):
        code, _, err = piped("Hello\n", "--session", session)
        assert code == 0
        assert ("talk: " in err) == bool(number)
    assert os.listdir(tmp_path) == ["talk.mlxkv"]


def test_options_reach_the_model(piped):
    code, out, _ = piped("Hello\n", "--system-prompt", "Be brief.", "--cache", "int8", "--session", "a")
    assert (code, out) == (0, expected_answers(["Hello"], system="Be brief.")[0] + "\n")
    code, out, err = piped("Hello\n", "--cache", "int8", "--session", "a")
    assert "1 turn" in err
    drawn = [piped("Hello\n", "--temp", "2", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--session", "../.."], "folder"),
        (["--session", "nowhere/a.mlxkv"], "no folder"),
        (["--session", "a:b"], "no name of a session"),
        (["--session", ".lock"], "no name of a session"),
        (["--session", ""], "no name of a session"),
        (["--cache", "int9"], "int9"),
        (["--top-p", "0.5"], "--temp"),
        (["--max-tokens", "0"], "not 1 or more"),
        (["--adapter-path", "nowhere"], "no adapter_config.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_said(piped, words, message):
    code, out, err = piped("Hello\n", *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [(b"PK\x03\x04", 2, "a dump (.npz), and no session"), (b"Dear diary", 2, "looks like text"), (b"", 3, "is empty")],
)
def test_other_files_are_no_sessions(piped, tmp_path, content, code, message):
    (path := tmp_path / "a.mlxkv").write_bytes(content)
    found, out, err = piped("Hello\n", "--session", path)
    assert (found, out, path.read_bytes()) == (code, "", content)
    assert message in err


def test_what_happens_in_a_pipe_ends_it(piped):
    code, out, err = piped("Hello\n/lod x\nAnd?\n")
    assert (code, out.count("\n")) == (2, 1)
    assert "there is no /lod" in err
    assert "did you mean /load?" in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_named(piped, monkeypatch, errors):
    lines = io.TextIOWrapper(io.BytesIO(b"Hello\n\xff\n"), "utf-8", errors)
    monkeypatch.setattr(io, "StringIO", lambda _: lines)
    code, _, err = piped(None)
    assert code == 2
    assert "a line that is not UTF-8" in err


def test_a_conversation_is_saved_loaded_and_taken_back(typed, home):
    code, out, err = typed(["Hello", "/save a", "And?", "/undo", "/undo", "/undo", "Again", "/stats", "/quit", "never"])
    assert code == 0
    assert out.count(expected_answers(["Hello"])[0]) == 1
    assert "taken back: And?" in err
    assert "nothing has been said that could be taken back" in err
    assert "a.mlxkv" in out.replace("\n", "")
    assert "uncompressed bytes" in out  # as the line after an answer calls them
    code, out, err = typed(["Hi", "/load b", "/load a", "/load a", "/save a", "/help", "/save"])
    assert code == 0
    assert "there is no session 'b'" in err
    assert "there is a" in err
    assert "a: 1 turn" in err
    assert "> Again" in err
    assert "is what goes on here already" in err
    assert chat.HELP in out
    assert max(map(len, chat.HELP.splitlines())) < 80
    code, out, err = typed(["/save", "/save a", "/load", "Hello", "/save a"])
    assert "has no name yet" in err
    assert "nothing has been said that could be saved" in err
    assert "a.mlxkv exists" in err.replace("\n", "")


def test_ctrl_c_twice_or_ctrl_d_leaves_and_once_does_not(typed):
    key = KeyboardInterrupt
    code, out, err = typed([key, "Hello", key, key, "never"])
    assert (code, out.strip()) == (0, expected_answers(["Hello"])[0])
    assert err.count("Ctrl-C again leaves") == 2
    assert typed(["Hello", EOFError, "never"])[0] == 0


def test_no_answer_moves_the_cursor(typed, monkeypatch):
    monkeypatch.setattr(Session, "stream", lambda *_, **__: (piece for piece in ["a\x1b[2Jb", "\u202e\n"]))
    monkeypatch.setattr(Session, "stats", lambda _: dict.fromkeys(("tokens", "full_bytes", "cache_bytes"), 1))
    _, out, _ = typed(["Hello"])
    assert "a\ufffd[2Jb\ufffd\n" in out


@pytest.mark.parametrize("command", ["inspect", "generate", "convert"])
def test_commands_that_take_files_say_where_a_session_of_that_name_is(command, home, tmp_path, monkeypatch, capsys):
    (home / "sessions").mkdir(parents=True)
    (home / "sessions" / "work.mlxkv").touch()
    monkeypatch.chdir(tmp_path)
    more = {"generate": ["--model", "any", "--prompt", "a"], "convert": ["a.npz"]}
    assert run(command, "work", *more.get(command, [])) == 2
    assert str(home / "sessions" / "work.mlxkv") in capsys.readouterr().err.replace("\n", "")


def test_lines_are_remembered_where_no_one_else_reads_them(home, monkeypatch):
    readline = pytest.importorskip("readline")
    readline.clear_history()
    with _sessions.line_editing():
        readline.add_history("What is a prime?")
    history = home / "state" / "chat_history"
    assert "What is a prime?" in history.read_text().replace("\\040", " ")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    readline.clear_history()
    with _sessions.line_editing():
        assert readline.get_history_item(readline.get_current_history_length()) == "What is a prime?"
    readline.clear_history()


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, *words):
        self.process, self.seen = pty.fork()
        self.text = ""
        if not self.process:
            command = [sys.executable, "-m", "mlxkv", "chat", *map(str, words)]
            os.execve(sys.executable, command, {**os.environ, "TERM": "dumb", "COLUMNS": "100"})

    def until(self, pattern):
        """Read until something is shown."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < deadline, self.text
            if select.select([self.seen], [], [], 1)[0]:
                self.text += os.read(self.seen, 4096).decode("utf-8", "replace")
        self.text = self.text[found.end() :]
        return found

    def type(self, text):
        os.write(self.seen, text.encode())

    def end(self):
        """Exit code."""
        try:
            while os.read(self.seen, 4096):
                pass
        except OSError:  # as Linux says that the other end is closed
            pass
        os.close(self.seen)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.slow
def test_a_chat_that_was_killed_goes_on_and_ctrl_c_ends_an_answer_but_not_the_chat(talker, home):
    first = Terminal("--model", talker, "--session", "work", "--max-tokens", 8)
    first.until(r"> ")
    first.type("Hello\r")
    first.until(r"saved in")
    first.type("And the")  # killed while typing
    os.kill(first.process, signal.SIGKILL)
    assert first.end() == -signal.SIGKILL
    second = Terminal("--model", talker, "--session", "work", "--max-tokens", 100_000)
    second.until(r"work: 1 turn, \d+ tokens, resumed in")
    second.until(r"> Hello\s+\S")
    second.until(r"> ")
    second.type("Tell me all\r")
    second.until(r"all\s+\S+")
    second.type("\x03")
    second.until(r"tokens · file .* saved in")
    second.until(r"> ")
    second.type("\x04")
    assert second.end() == 0
    assert os.listdir(home / "sessions") == ["work.mlxkv"]

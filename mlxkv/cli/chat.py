"""mlxkv chat: a conversation in the terminal that goes on tomorrow."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text

from mlxkv.cli._checks import at_least_1
from mlxkv.cli._commands import commands
from mlxkv.cli._failures import failure_of
from mlxkv.cli._files import COMPRESSED, LIVE, kind_of
from mlxkv.cli._names import Cache, Model
from mlxkv.cli._output import format_value, print_record, printable
from mlxkv.cli._sampling import Sampling, Seed, Temp, TopP, XtcProbability, XtcThreshold
from mlxkv.cli._sessions import line_editing, session_names, session_path
from mlxkv.cli._work import ending_at_interrupt, load_model, promise, working
from mlxkv.errors import InputError, MlxkvError, suggest

if TYPE_CHECKING:
    from mlxkv.session import Session

HELP = """\
/save NAME   save the conversation under a name, from now on after each answer
/load NAME   go on with another conversation
/undo        take the last question and its answer back
/stats       sizes: in the file, in 16 bits without compression, in memory
/quit        leave, as Ctrl-D does; Ctrl-C stops an answer
//...        say something that begins with a slash"""


@commands.register("chat")
def chat_command(
    model: Model,
    session: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Go on with this one, or begin it: a name or a path.", autocompletion=session_names
        ),
    ] = None,
    cache: Cache = None,
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told first.")] = None,
    adapter_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter of the model.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", metavar="N", help="Tokens of an answer, at most.", callback=at_least_1)
    ] = 256,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    xtc_probability: XtcProbability = 0.0,
    xtc_threshold: XtcThreshold = 0.1,
    seed: Seed = None,
) -> None:
    """Chat with a model. A session is saved after each answer, compressed, and goes on where it stopped.

    Lines from a pipe are one question each. /help lists what can be done while chatting.

    Example: mlxkv chat --model smollm2-135m --session work
    """
    sampling = Sampling(temp, top_p, xtc_probability=xtc_probability, xtc_threshold=xtc_threshold, seed=seed)
    sampling.check()
    path = None if session is None else session_path(session)
    if path is not None and path.exists() and (kind := kind_of(path)) not in (COMPRESSED, LIVE):
        raise InputError(f"{path} is {kind}, and no session", "give another name")
    if cache is not None:
        from mlxkv.live import live_config

        live_config(cache)
    loaded, tokenizer = load_model(model, adapter_path)
    asked = _Asked(loaded, tokenizer, model, cache, system_prompt, max_tokens, sampling.make(tokenizer))
    with _Chat(asked, path) as chat, line_editing() if chat.interactive else nullcontext():
        chat.run()


class _Asked(NamedTuple):
    """Wishes of the command line, and the model."""

    model: Any
    tokenizer: Any
    name: str
    cache: str | None
    system: str | None
    max_tokens: int
    sampler: Any

    def open(self, path: Path | None) -> Session:
        from mlxkv.session import Session

        return Session(self.model, self.tokenizer, path, system=self.system, cache=self.cache, name=self.name)


class _StoppedError(Exception):
    """Ctrl-C while the model was reading."""


class _Chat:
    """The conversation in the terminal: answers on standard output, everything else on standard error."""

    def __init__(self, asked: _Asked, path: Path | None) -> None:
        self._asked = asked
        self._console = Console(stderr=True, highlight=False, markup=False)
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/save": self._save, "/load": self._load, "/undo": self._undo, "/stats": self._stats, "/help": self._help,
        }  # fmt: skip
        self._open(path)

    def __enter__(self) -> _Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(self) -> None:
        """Take lines until there are no more."""
        promise("the session is as it was after the last answer" if self._session.path else "nothing was saved")
        if self.interactive and not self._session.turns:
            self._say("/help lists what can be done, Ctrl-D leaves")
        while (line := self._next_line()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word in ("/quit", "/exit"):
                return
            if not word:
                continue
            try:
                if word.startswith("/") and not word.startswith("//"):
                    self._command(word)(rest.strip())
                else:
                    self._answer(line.strip()[line.strip().startswith("//") :])
            except MlxkvError as error:
                if not self.interactive:
                    raise
                failure_of(error, []).show(as_json=False)

    def _next_line(self) -> str | None:
        """Return what was typed; None at the end, and after Ctrl-C twice."""
        if not self.interactive:
            return _piped_line()
        for last in (False, True):
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                if not last:
                    self._say("Ctrl-C again leaves, and so does Ctrl-D")
        return None

    def _command(self, word: str) -> Callable[[str], None]:
        if word not in self._commands:
            raise InputError(f"there is no {word[:40]}", suggest(word, [*self._commands, "/quit"]))
        return self._commands[word]

    def _answer(self, text: str) -> None:
        """Say something, show the answer as it comes, and save it."""
        session = self._session
        with working("answering", spin=False), ending_at_interrupt() as stopping:

            def check(*_: int) -> None:
                if stopping():
                    raise _StoppedError

            pieces = session.stream(
                text, max_tokens=self._asked.max_tokens, sampler=self._asked.sampler, progress=check
            )
            try:
                with working("reading") if self.interactive else nullcontext():
                    first = next(pieces, "")
                self._show(first)
                for piece in pieces:
                    self._show(piece)
                    if stopping():
                        break
                pieces.close()
            except _StoppedError:
                self._say("stopped before the answer began: nothing was said")
                return
            print(flush=True)
            seconds = self._write()
        self._summarize(seconds, session.lost)

    def _show(self, text: str) -> None:
        print(printable(text) if self.interactive else text, end="", flush=True)

    def _write(self) -> float | None:
        """Save the conversation where it has a file; return how long that took."""
        if self._session.path is None:
            return None
        start = time.perf_counter()
        self._session.save()
        return time.perf_counter() - start

    def _summarize(self, seconds: float | None = None, lost: int = 0) -> None:
        """Say in one line how large the conversation is."""
        session = self._session
        facts = session.stats()
        full, cache = (format_value("bytes", facts[key]) for key in ("full_bytes", "cache_bytes"))
        parts = [f"{facts['tokens']:,} tokens"]
        if session.path is not None:
            parts.append(f"file {format_value('bytes', facts['file_bytes'])}, uncompressed {full}")
        else:
            parts.append(f"cache {cache}, in 16 bits {full}")
        if seconds is not None:
            parts.append(f"saved in {format_value('seconds', seconds)}")
        if lost:
            parts.append(f"the chat template changed what was said: {lost:,} tokens were taken out of the cache")
        self._say(" · ".join(parts))

    def _open(self, path: Path | None) -> None:
        """Begin a conversation, or go on with that of a file."""
        start = time.perf_counter()
        with working(f"opening {path.stem}" if path else "beginning"):
            self._session = self._asked.open(path)
        if not self._session.resumed:
            return
        facts, seconds = self._session.stats(), format_value("seconds", time.perf_counter() - start)
        turns = "1 turn" if facts["turns"] == 1 else f"{facts['turns']:,} turns"
        sizes = [format_value("bytes", facts[key]) for key in ("file_bytes", "full_bytes")]
        name = path.stem if path else ""
        self._say(
            f"{name}: {turns}, {facts['tokens']:,} tokens, resumed in {seconds} · file {sizes[0]}, uncompressed {sizes[1]}"
        )
        if self.interactive:
            for message in self._session.messages[-2:]:
                if message["role"] != "system":
                    self._say(f"> {message['content']}" if message["role"] == "user" else message["content"])

    def _save(self, name: str) -> None:
        """Save under a name, or where the conversation is saved already."""
        if not name and self._session.path is None:
            raise InputError("the conversation has no name yet", "/save NAME gives it one")
        if not self._session.tokens:
            raise InputError("nothing has been said that could be saved")
        with working("saving"):
            self._session.save(session_path(name) if name else None)
        self._summarize()

    def _load(self, name: str) -> None:
        """Go on with another conversation."""
        if not name:
            raise InputError("say which: /load NAME", suggest("", session_names()))
        if not (path := session_path(name)).exists():
            raise InputError(f"there is no session {name[:80]!r}", suggest(name, session_names()))
        before = self._session
        if before.path is not None and before.path == path.resolve():
            raise InputError(f"{name} is what goes on here already")
        self._open(path)
        before.close()

    def _undo(self, _: str) -> None:
        """Take the last turn back."""
        with working("taking the last turn back"):
            said = self._session.undo()
            seconds = self._write()
        self._say(f"taken back: {said}")
        self._summarize(seconds)

    def _stats(self, _: str) -> None:
        """Print what is known of the conversation's size."""
        facts, path = self._session.stats(), self._session.path
        full, cache = facts.pop("full_bytes"), facts.pop("cache_bytes")
        ratio = full / facts["file_bytes"] if facts["file_bytes"] else None
        more = {"uncompressed_bytes": full, "ratio": ratio, "memory_bytes": cache}
        print_record({"file": str(path) if path else None, **facts, **more}, as_json=False)

    def _help(self, _: str) -> None:
        """Print the commands."""
        print(HELP)

    def _say(self, text: str) -> None:
        """Say something beside the conversation, dimmed."""
        self._console.print(Text(printable(text), "dim"), soft_wrap=True)


def _piped_line() -> str | None:
    """Return a line of standard input; None at its end."""
    try:
        line = sys.stdin.readline() if sys.stdin else ""
        line.encode()  # in some locales Python lets through what is no text
    except UnicodeError:
        raise InputError("standard input has a line that is not UTF-8") from None
    return line or None

"""`Session`: a conversation with a model, which goes on where it was saved."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import stock
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.config import Config
from mlxkv.errors import InputError, MismatchError
from mlxkv.identity import fingerprint
from mlxkv.io.disk import write_target
from mlxkv.io.ownership import Ownership
from mlxkv.live import live_config, make_cache
from mlxkv.live.base import LayerCache
from mlxkv.models import cache_spec
from mlxkv.session.answers import Answer
from mlxkv.session.cached import CachedTokens
from mlxkv.session.files import CompressedFile, Facts, LiveFile, Model, SessionFile, is_live
from mlxkv.session.templates import Message, Template
from mlxkv.spec import is_int

Progress = Callable[[int, int], None]


class Session:
    """A conversation with a model. Opened again with the same file, it goes on where it was saved.

    What the model reads is always what its chat template makes of all messages. Where that changes what was read before, as with
    templates that drop earlier thinking, the cache goes back to what is still the same.

    Parameters
    ----------
    model, tokenizer
        As `mlxkv.lm.load` or mlx-lm's `load` returns them.
    path
        File of the conversation, which goes on if it exists; None to keep it in memory until `save` is given a name. It
        belongs to this process until `close`.
    system
        System prompt of a new conversation.
    cache
        Live preset or method to run in, such as "int8"; None for mlx-lm's own cache. The file is a saved live cache then, and
        otherwise a compressed one.
    artifacts
        Artifacts to begin a compressed file with; None for the model's newest ones, or for some that need no calibration. A
        file goes on with those it was begun with.
    quality
        Quality to begin a compressed file with, 0 to 100; None for the method's default.
    name
        Name of the model, for the file.

    Attributes
    ----------
    path
        The file; None while there is none.
    resumed
        Whether the conversation was read from a file.
    lost
        Tokens that the last turn or `undo` took out of the cache, since the template did not go on with them.

    Raises
    ------
    InputError
        When another process has this conversation open, or the file holds a cache without a conversation.
    MismatchError
        When the file is of another model or adapter, of other artifacts, of another live method, or of another system prompt.
    FormatError
        When it is damaged.
    UnsupportedError
        For a model whose cache cannot be described or saved.

    Examples
    --------
    A conversation, today and tomorrow::

        model, tokenizer = mlxkv.lm.load("smollm2-135m")
        with mlxkv.Session(model, tokenizer, "work.mlxkv") as session:
            print(session.send("What is a prime number?"))
            for text in session.stream("Name three."):
                print(text, end="")
            session.save()
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        path: str | Path | None = None,
        *,
        system: str | None = None,
        cache: str | None = None,
        artifacts: CalibrationArtifacts | None = None,
        quality: float | None = None,
        name: str = "",
    ) -> None:
        self._model = Model(model, cache_spec(model), fingerprint(model), name)
        self._tokenizer, self._preset = tokenizer, cache
        self._coding = artifacts, quality
        self._owned: Ownership | None = None
        self._file: SessionFile | None = None
        self._running: Generator[str, None, None] | None = None
        self._cached = CachedTokens(partial(_new_cache, model, cache))
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": _text(system)}]
        self._began = datetime.now().replace(microsecond=0)
        self._changed, self.resumed, self.lost = False, False, 0
        if path is not None:
            self._file, self._owned = self._own(path)
            try:
                self._open(system)
            except BaseException:
                self.close()
                raise
        self._template = Template(tokenizer, self._began)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the file. Nothing is saved."""
        if self._owned is not None:
            self._owned.release()
        self._owned = self._file = None

    @property
    def path(self) -> Path | None:
        """The file; None while there is none."""
        return None if self._file is None else self._file.path

    @property
    def messages(self) -> list[Message]:
        """What was said: dictionaries with a `role` and a `content`, a system prompt first."""
        return [dict(message) for message in self._messages]

    @property
    def tokens(self) -> list[int]:
        """Token ids that the model has read and written, as they are in its cache."""
        return list(self._cached.tokens)

    @property
    def turns(self) -> int:
        """Number of answers."""
        return sum(message["role"] == "assistant" for message in self._messages)

    def send(self, text: str, *, max_tokens: int = 256, sampler: Any = None) -> str:
        """Say something, and return the model's answer.

        Parameters
        ----------
        text
            What to say.
        max_tokens
            Tokens of the answer, at most; -1 for any number.
        sampler
            One of mlx-lm's `make_sampler`; None for the most likely token.

        Returns
        -------
        str
            The answer.

        Raises
        ------
        InputError
            When the model's template refuses the conversation, and for what is no text, or no number of tokens.
        """
        return "".join(self.stream(text, max_tokens=max_tokens, sampler=sampler))

    def stream(
        self, text: str, *, max_tokens: int = 256, sampler: Any = None, progress: Progress | None = None
    ) -> Generator[str, None, None]:
        """Say something, and yield the model's answer piece by piece.

        An answer that is not read to its end stays as far as it came: it ends at the latest with the next turn, `undo` or
        `save`. One that fails before its first piece leaves the conversation as it was.

        Parameters
        ----------
        text
            What to say.
        max_tokens
            Tokens of the answer, at most; -1 for any number.
        sampler
            One of mlx-lm's `make_sampler`; None for the most likely token.
        progress
            Called with the number of tokens that are read, and of all that are to be read before the answer. An exception
            that it raises stops the reading.

        Yields
        ------
        str
            The next part of the answer.

        Raises
        ------
        InputError
            When the model's template refuses the conversation, and for what is no text, or no number of tokens.
        """
        if not (is_int(max_tokens, 1) or max_tokens == -1):
            raise InputError(f"max_tokens must be 1 or more, or -1 for any number, not {str(max_tokens)[:80]}")
        self._end_answer()
        pieces = self._running = self._answer(_text(text), max_tokens, sampler, progress)
        try:
            yield from pieces
        finally:
            if self._running is pieces:
                self._running = None

    def _end_answer(self) -> None:
        """End an answer that someone has not read to its end, before the cache is used for something else."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _answer(
        self, text: str, max_tokens: int, sampler: Any, progress: Progress | None
    ) -> Generator[str, None, None]:
        """Yield an answer, for `stream`."""
        messages: list[Message] = [*self._messages, {"role": "user", "content": text}]
        prompt = self._template.render(messages)
        self.lost = self._cached.go_to(prompt)
        unread = prompt[len(self._cached.tokens) :]

        def report(done: int, total: int) -> None:
            if done == total - 1:  # the last token is read together with the first of the answer
                self._cached.remember(len(prompt) - 1)
            if progress:
                progress(done, total)

        responses = stream_generate(
            self._model.model, self._tokenizer, mx.array(unread), max_tokens, sampler=sampler,
            prompt_cache=self._cached.cache, prompt_progress_callback=report,
        )  # fmt: skip
        answer = Answer(self._tokenizer, self._template.stops)
        try:
            for response in responses:
                yield answer.take(response)
                if answer.stopped:
                    break
        except GeneratorExit:
            self._finish(responses, prompt, answer, messages)
            raise
        except BaseException:
            self._finish(responses, prompt, answer, messages, interrupted=True)
            raise
        self._finish(responses, prompt, answer, messages)

    def undo(self) -> str:
        """Take the last turn back: what was said, and its answer.

        Returns
        -------
        str
            What was said.

        Raises
        ------
        InputError
            When nothing was said.
        """
        self._end_answer()
        last = max((i for i, message in enumerate(self._messages) if message["role"] == "user"), default=None)
        if last is None:
            raise InputError("nothing has been said that could be taken back")
        said, stay = self._messages[last]["content"], self._messages[:last]
        answered = any(message["role"] == "assistant" for message in stay)
        # Every conversation begins with the same token, so that one always stays: a file holds at least one.
        rest = self._template.render(stay if answered else self._messages, answer=False)[: None if answered else 1]
        self._messages = stay
        self.lost = self._cached.go_to(rest, unread=0)
        if not self._cached.tokens:
            self._read(rest)
        self._changed = True
        return said

    def save(self, path: str | Path | None = None) -> int:
        """Save the conversation, in a file that it is from now on saved in.

        Parameters
        ----------
        path
            A new file; None for the one that it was opened with.

        Returns
        -------
        int
            Bytes of the file that were written; 0 where nothing has changed, or nothing has been said yet.

        Raises
        ------
        InputError
            When there is no file, the new one exists, or it cannot be written.
        MismatchError
            When something else has written the file meanwhile.
        """
        self._end_answer()
        if path is None or (self._file is not None and write_target(path) == self._file.path):
            if self._file is None:
                raise InputError("this conversation has no file: give save a name")
            return self._write(self._file) if self._changed else 0
        file, owned = self._own(path, new=True)
        try:
            written = self._write(file)
        except BaseException:
            owned.release()
            raise
        if self._owned is not None:
            self._owned.release()
        self._file, self._owned = file, owned
        return written

    def _write(self, file: SessionFile) -> int:
        """Write the conversation to a file; return the bytes."""
        if not self._cached.tokens and self.turns:  # an interruption has cost the whole cache
            self._read(self._template.render(self._messages, answer=False))
        if not self._cached.tokens:
            return 0
        facts = Facts(self._messages, self._began, self._template.digest)
        written = file.save(self._cached.cache, self._cached.tokens, facts)
        self._changed = False
        return written

    def stats(self) -> dict[str, int]:
        """Return how large the conversation is.

        Returns
        -------
        dict
            `turns`; `tokens`; `file_bytes`, 0 while there is no file; `full_bytes`, which mlx-lm's own cache of these tokens
            takes at 16 bits an element; and `cache_bytes` of the cache that is in memory now, steps allocated in advance
            included.
        """
        count, path = len(self._cached.tokens), self.path
        spec, entries = self._model.spec, stock.entries(self._cached.cache)
        full = sum(2 * layer.rows(count) * slot.heads * slot.dim for layer in spec.layers if layer for slot in layer)
        full += sum(
            entries[i].nbytes for i, layer in enumerate(spec.layers) if layer is None and entries[i] is not None
        )
        return {
            "turns": self.turns,
            "tokens": count,
            "file_bytes": path.stat().st_size if path is not None and path.exists() else 0,
            "full_bytes": full,
            "cache_bytes": self._cached.nbytes if count else 0,
        }

    def _own(self, path: str | Path, *, new: bool = False) -> tuple[SessionFile, Ownership]:
        """Take a file for this process, and find out of which kind it is."""
        owned = Ownership(path)
        try:
            target, is_there = owned.target, owned.target.exists()
            if new and is_there:
                raise InputError(f"{path} exists: give another name")
            entries = stock.entries(self._cached.cache)
            live = is_live(target) if is_there else any(isinstance(entry, LayerCache) for entry in entries)
            coded = None if live else CompressedFile(target, self._model, *self._coding)
            return coded or LiveFile(target, self._model), owned
        except BaseException:
            owned.release()
            raise

    def _open(self, system: str | None) -> None:
        """Read the conversation from the file, if there is one."""
        assert self._file is not None
        if not self._file.path.exists():
            return
        cache, tokens, facts = self._file.load()
        self._cached = CachedTokens(partial(_new_cache, self._model.model, self._method_of(cache)), cache, tokens)
        self._messages, self._began, self.resumed = facts.messages, facts.began, True
        found = next((message["content"] for message in self._messages if message["role"] == "system"), None)
        if system not in (None, found):
            before = "without a system prompt" if found is None else f"with the system prompt {str(found)[:80]!r}"
            raise MismatchError(
                f"{self.path} was begun {before}, not with {system[:80]!r}",
                "go on without naming one, or begin another session",
            )

    def _method_of(self, cache: Sequence[Any]) -> Config | None:
        """Return the live method of a file, which has to be the one that was asked for, if one was."""
        found = {entry.config for entry in stock.entries(cache) if isinstance(entry, LayerCache)}
        if self._preset is not None and found != {live_config(self._preset)}:
            kind = "a live cache of another kind" if found else "a compressed cache"
            raise MismatchError(
                f"{self.path} was not begun in {self._preset}: it is {kind}",
                "leave the cache out to go on in the file's own",
            )
        return next(iter(found), None)

    def _finish(
        self, responses: Any, prompt: list[int], answer: Answer, messages: list[Message], interrupted: bool = False
    ) -> None:
        """Note what was read and written, and the answer as far as it came."""
        responses.close()
        self._cached.settle([*prompt, *answer.tokens], interrupted=interrupted)
        if answer.tokens:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
            self._changed = True

    def _read(self, tokens: Sequence[int]) -> None:
        """Read tokens into an empty cache."""
        from mlxkv.lm import prefill

        prefill(self._model.model, tokens, self._cached.cache)
        self._cached.tokens = list(tokens)


def _new_cache(model: Any, method: str | Config | None) -> list[Any]:
    """Return an empty prompt cache: mlx-lm's own, or a live one."""
    return make_prompt_cache(model) if method is None else list(make_cache(model, method))


def _text(said: str) -> str:
    """Return what is said, which has to be text: a file could not hold it otherwise."""
    try:
        said.encode()
    except (AttributeError, UnicodeError):
        raise InputError(f"what is said must be text, without halves of characters: {said!r:.80}") from None
    return said

"""Files that hold a conversation: a compressed cache that grows with each turn, or a saved live cache.

The header's `notes` hold what a cache does not: the messages, when the conversation began, and which template it had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from mlxkv import lm, stock
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.reading import header_object, read_layouts
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.unquantized import read_plain_array
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.identity import same_model
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader
from mlxkv.io.growing import finish_interrupted_append
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.session.templates import Message
from mlxkv.spec import CacheSpec, is_int

LIVE = "live cache"
ROLES = ("system", "user", "assistant")


class Model(NamedTuple):
    """A model, and what files say of it.

    Parameters
    ----------
    model
        The loaded mlx-lm model.
    spec
        Description of its cache.
    fingerprint
        `mlxkv.identity.fingerprint` of it.
    name
        Name that it was loaded by.
    """

    model: Any
    spec: CacheSpec
    fingerprint: str
    name: str


class Facts(NamedTuple):
    """Facts of a conversation that its cache does not hold.

    Parameters
    ----------
    messages
        What was said.
    began
        When the conversation began.
    template
        `Template.digest` of the model's template.
    """

    messages: list[Message]
    began: datetime
    template: str

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values.

        Returns
        -------
        dict
            The keys `messages`, `began` and `template`.
        """
        return {"messages": self.messages, "began": self.began.isoformat(), "template": self.template}


class Saved(NamedTuple):
    """A conversation as a file holds it.

    Parameters
    ----------
    cache
        Its prompt cache.
    tokens
        Token ids that are in the cache.
    facts
        The rest.
    """

    cache: list[Any]
    tokens: list[int]
    facts: Facts


class CompressedFile:
    """A compressed cache, to which each turn is appended.

    Parameters
    ----------
    path
        The file.
    model
        The model.
    artifacts
        Those to begin a file with; None for `library.for_model`. A file that exists goes on with its own.
    quality
        Quality to begin a file with; None for the method's default.

    Raises
    ------
    MismatchError
        When the file's artifacts are not here, or are not those given.
    """

    def __init__(self, path: Path, model: Model, artifacts: CalibrationArtifacts | None, quality: float | None) -> None:
        self.path, self._model = path, model
        self._own: list[list[int]] = []  # tokens that the file can hold if only this conversation writes it
        if path.exists():
            finish_interrupted_append(path)
            artifacts = library.for_file(path) if artifacts is None else artifacts
            self._codec = codec_of_file(path, artifacts)
        else:
            artifacts = artifacts or library.for_model(model.spec, model.fingerprint, model.name)
            self._codec = CacheCodec(artifacts, quality=quality)

    def load(self) -> Saved:
        """Read the conversation.

        Returns
        -------
        Saved
            What the file holds.

        Raises
        ------
        MismatchError
            When it is of another model.
        FormatError
            When it is damaged, or is no conversation.
        """
        with Reader(self.path) as reader:
            meta = header_object(reader, "meta")
            facts = read_facts(meta.get("notes"), reader.name)
        _check_model(self.path, str(meta.get("fingerprint", "")), str(meta.get("model", "")), self._model)
        dump = self._codec.decompress_dump(self.path)
        if dump.tokens.shape[0] != 1:
            raise FormatError(f"{self.path} is of {dump.tokens.shape[0]} texts: a conversation is one")
        tokens = dump.tokens[0].tolist()
        self._own = [tokens]
        cache = lm.restore(self._model.model, replace(dump, fingerprint=""))  # which was compared above
        return Saved(cache, list(tokens), facts)

    def save(self, cache: list[Any], tokens: Sequence[int], facts: Facts) -> int:
        """Write the conversation, of which complete blocks are neither copied out of the cache nor written again.

        Parameters
        ----------
        cache
            Its prompt cache.
        tokens
            Token ids that are in it; at least one.
        facts
            The rest.

        Returns
        -------
        int
            Bytes of the file that are new.

        Raises
        ------
        MismatchError
            When something else than this conversation has been written to the file meanwhile.
        InputError
            When it cannot be written.
        """
        spec, notes = self._model.spec, facts.to_json()
        kind = str(stock.entries(cache)[spec.groups[0].indices[0]].keys.dtype).removeprefix("mlx.core.")

        def copy(start: int) -> Any:
            return lm.extract_cache(
                cache, spec, [list(tokens)], model=self._model.name, fingerprint=self._model.fingerprint,
                dtype="float16" if kind == "float16" else "float32", start=start,
            )  # fmt: skip

        goes_on = self._goes_on(kind)
        self._own.append(list(tokens))  # also where an interruption comes after the write
        if goes_on:
            start = self._codec.append_start(self.path, tokens)
            written = self._codec.append_dump(self.path, copy(start), notes=notes, rewind=True)
        else:
            data = self._codec.compress_dump(copy(0), notes=notes)
            with atomic_write(self.path) as file:
                file.write(data)
            written = len(data)
        del self._own[:-1]
        return written

    def _goes_on(self, kind: str) -> bool:
        """Return whether the file can be appended to: it is there, as this conversation left it, of a cache of this type."""
        if not self.path.exists():
            return False
        with Reader(self.path) as reader:
            found, meta = stored_tokens(reader), header_object(reader, "meta")
        if found not in self._own:
            raise MismatchError(
                f"{self.path} is not as this conversation left it: something else has written it",
                "save under another name",
            )
        return meta.get("dtype") == kind and str(meta.get("model", "")) == self._model.name


class LiveFile:
    """A saved live cache, which is written anew each time.

    Parameters
    ----------
    path
        The file.
    model
        The model.
    """

    def __init__(self, path: Path, model: Model) -> None:
        self.path, self._model = path, model

    def load(self) -> Saved:
        """Read the conversation.

        Returns
        -------
        Saved
            What the file holds: the cache goes on exactly as the one that was saved.

        Raises
        ------
        MismatchError
            When it is of another model.
        FormatError
            When it is damaged, or is no conversation.
        """
        with Reader(self.path) as reader:
            stored, name = reader.header.get("notes"), reader.name
        facts = read_facts(stored, name)
        tokens = stored.get("tokens") if isinstance(stored, dict) else None
        cache = load_cache(self.path, self._model.model)
        seen = max((getattr(entry, "offset", 0) for entry in stock.entries(cache)), default=0)
        if not isinstance(tokens, list) or not all(is_int(token) for token in tokens) or len(tokens) != seen:
            raise FormatError(f"{name} does not hold the {seen} tokens that its cache has seen")
        return Saved(list(cache), tokens, facts)

    def save(self, cache: list[Any], tokens: Sequence[int], facts: Facts) -> int:
        """Write the conversation.

        Parameters
        ----------
        cache
            Its prompt cache.
        tokens
            Token ids that are in it.
        facts
            The rest.

        Returns
        -------
        int
            Bytes of the file.

        Raises
        ------
        InputError
            When it cannot be written.
        """
        save_cache(self.path, self._model.model, cache, notes={**facts.to_json(), "tokens": list(tokens)})
        return self.path.stat().st_size


SessionFile = CompressedFile | LiveFile


def is_live(path: Path) -> bool:
    """Return whether a file is a saved live cache.

    Parameters
    ----------
    path
        A container.

    Returns
    -------
    bool
        False for a compressed cache.

    Raises
    ------
    FormatError
        When it is no intact container.
    """
    with Reader(path) as reader:
        return reader.header.get("kind") == LIVE


def codec_of_file(path: Path, artifacts: CalibrationArtifacts) -> CacheCodec:
    """Return a codec with the settings that a file was written with.

    Parameters
    ----------
    path
        A compressed file.
    artifacts
        Its artifacts.

    Returns
    -------
    CacheCodec
        A codec that reads the file and appends to it.

    Raises
    ------
    FormatError
        When the file has impossible settings.
    """
    with Reader(path) as reader:
        layout, header = read_layouts(reader)[0], reader.header
        coding = "rans" if any(section.coding == "rans" for section in reader.sections.values()) else "deflate"
    unquantized = header.get("window_quality") is None
    try:
        return CacheCodec(
            artifacts,
            layout.recent,
            layout.sinks,
            lossless=coding,
            quality=header.get("quality"),
            raw_window=unquantized,
        )
    except InputError as error:
        raise FormatError(f"{path}: {error}") from error


def stored_tokens(reader: Reader) -> list[int]:
    """Return the token ids of a compressed cache of one text.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    list of int
        Token ids.

    Raises
    ------
    FormatError
        When it has none.
    """
    return read_plain_array(reader, "tokens").reshape(-1).tolist()


def read_facts(notes: Any, name: str) -> Facts:
    """Return the facts of a conversation, from any source.

    Parameters
    ----------
    notes
        What a file's header holds.
    name
        Name of the file, for messages.

    Returns
    -------
    Facts
        The facts.

    Raises
    ------
    InputError
        When the file has none: it is no conversation.
    FormatError
        When they are malformed.
    """
    if notes is None:
        raise InputError(f"{name} holds a cache, but no conversation", "mlxkv generate goes on from it")
    if not isinstance(notes, Mapping) or not isinstance(notes.get("messages"), list):
        raise FormatError(f"{name} has notes {str(notes)[:80]}, which are not of a conversation")
    messages = notes["messages"]
    for message in messages:
        texts = isinstance(message, dict) and set(message) == {"role", "content"} and message["role"] in ROLES
        if not texts or not isinstance(message["content"], str):
            raise FormatError(f"{name} has a message {str(message)[:80]}, which no one can have said")
    try:
        began = datetime.fromisoformat(str(notes.get("began")))
    except ValueError:
        raise FormatError(f"{name} began at {str(notes.get('began'))[:80]!r}, which is no time") from None
    return Facts(messages, began, str(notes.get("template", ""))[:80])


def _check_model(path: Path, stated: str, name: str, model: Model) -> None:
    if not same_model(stated, model.fingerprint):
        raise MismatchError(
            f"{path} is a conversation with {name[:200] or 'a model'} of fingerprint {stated[:60]}; this model, or this"
            f" model with this adapter, is {model.fingerprint}"
        )

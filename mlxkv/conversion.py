"""Caches in one kind of file, made into another: dumps, compressed caches, saved live caches, prompt caches of mlx-lm.

Between the two stands a dump, which needs no model, or mlx-lm's own prompt cache of the model. What a kind cannot hold is
refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm, stock
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError, UnsupportedError
from mlxkv.identity import fingerprint
from mlxkv.io.atomic import atomic_write
from mlxkv.live.base import LayerCache
from mlxkv.live.exchange import live_cache, plain_cache
from mlxkv.live.prompt_files import LAYOUTS, describe_prompt_cache, read_prompt_cache, write_prompt_cache
from mlxkv.live.serialization import load_cache, read_notes, save_cache
from mlxkv.models import cache_spec
from mlxkv.spec import is_int

DUMP, COMPRESSED, LIVE, PROMPT, OLD_PROMPT = KINDS = ("npz", "mlxkv", "live", "prompt", "prompt-0.31")
WITHOUT_MODEL = (DUMP, COMPRESSED)
Progress = Callable[[int], None]
_MOST = 2**31 - 1  # of a token id
_COMPARED = (
    64  # first tokens of a text that are compared where what a layer keeps of later ones depends on those before
)
_CHUNK, _BEFORE = 512, 16  # else all are, so many at a time, with a few before them: some models embed several as one
_FAR = 0.8  # relative distance of a token's values; those of another token are about 1.4 apart


@dataclass
class Content:
    """Content of a file: a dump, or a prompt cache of the loaded model. One of the two takes the other's place.

    Parameters
    ----------
    dump
        The dump; None where there is a prompt cache.
    cache
        The prompt cache, live or mlx-lm's own; None where there is a dump.
    tokens
        Token ids of a prompt cache, None where they are not known.
    texts
        What mlx-lm wrote beside the states, by name.
    """

    dump: KVDump | None = None
    cache: list[Any] | None = None
    tokens: list[int] | None = None
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of tokens."""
        if self.dump is not None:
            return self.dump.length
        return max(getattr(entry, "offset", 0) for entry in stock.entries(self.cache or []))


def read_content(path: str | Path, kind: str, model: Any = None, *, artifacts: str | Path | None = None,
                 limit: int | None = None, progress: Progress | None = None) -> Content:  # fmt: skip
    """Read a file.

    Parameters
    ----------
    path
        The file, from any source.
    kind
        What it is, one of `KINDS`.
    model
        The model of its cache, for kinds other than `WITHOUT_MODEL`.
    artifacts
        Folder of a compressed cache's artifacts; None for those of the library.
    limit
        Bytes that a compressed cache may decode to, as for `CacheCodec.decompress_dump`.
    progress
        Called with the number of tokens that are decoded.

    Returns
    -------
    Content
        What it holds.

    Raises
    ------
    InputError
        When it cannot be opened, or is too large.
    FormatError
        When it is damaged.
    MismatchError
        When it is of another model, or its artifacts are not here.
    UnsupportedError
        When it holds what mlxkv has no support for.
    """
    if kind == DUMP:
        return Content(read_dump(path))
    if kind == COMPRESSED:
        found = library.for_file(path) if artifacts is None else CalibrationArtifacts.from_dir(artifacts)
        return Content(CacheCodec(found).decompress_dump(path, progress, limit=limit))
    if kind == LIVE:
        content = Content(cache=list(load_cache(path, model)), tokens=noted_tokens(path))
        if content.tokens is not None and len(content.tokens) != content.length:
            raise FormatError(f"{path} names {len(content.tokens)} tokens, and its cache has seen {content.length}")
        return content
    facts = describe_prompt_cache(path)
    return Content(
        cache=read_prompt_cache(path, model, widen=False), tokens=facts["token_ids"], texts=facts["metadata"]
    )


def noted_tokens(path: str | Path) -> list[int] | None:
    """Return the tokens that a saved live cache names in its notes.

    Parameters
    ----------
    path
        The file, from any source.

    Returns
    -------
    list of int or None
        Token ids, which are not held against the cache; None where it names none.

    Raises
    ------
    InputError
        When it cannot be opened.
    FormatError
        When it is damaged.
    """
    tokens = read_notes(path).get("tokens")
    if tokens is not None and not (isinstance(tokens, list) and all(is_int(token, 0, _MOST) for token in tokens)):
        raise FormatError(f"{path} names {str(tokens)[:40]} as its tokens, which are none")
    return tokens


def codec_for(content: Content, method: str | None = None, *, model: Any = None, name: str = "",
              artifacts: str | Path | None = None) -> CacheCodec:  # fmt: skip
    """Return the codec that compresses what a file holds.

    Parameters
    ----------
    content
        What is to be compressed.
    method
        Name of a codec method; None for the newest calibration of the model, or `direct` where there is none.
    model
        The model of a prompt cache; a dump needs none.
    name
        Name that the model was loaded by.
    artifacts
        Folder of artifacts in place of the library's; None for those.

    Returns
    -------
    CacheCodec
        The codec, with its default settings.

    Raises
    ------
    InputError
        When there are no artifacts of this method.
    FormatError
        When the artifacts are damaged.
    """
    if artifacts is not None:
        return CacheCodec(CalibrationArtifacts.from_dir(artifacts))
    if content.dump is not None:
        dump = content.dump
        return CacheCodec(library.for_model(dump.spec, dump.fingerprint, dump.model, method))
    return CacheCodec(library.for_model(cache_spec(model), fingerprint(model), name, method))


def write_content(path: str | Path, kind: str, content: Content, model: Any = None, *, name: str = "", method: str = "full",
                  codec: CacheCodec | None = None, progress: Progress | None = None) -> None:  # fmt: skip
    """Write what a file holds as another kind of file. The content is used up, so that there is one copy of it at a time.

    Parameters
    ----------
    path
        The file to write; a failed write leaves no partial file.
    kind
        What to write, one of `KINDS`.
    content
        What `read_content` returned.
    model
        The model of the cache, unless both kinds are among `WITHOUT_MODEL`.
    name
        Name that the model was loaded by, for files that name it.
    method
        Live method or preset of a live cache.
    codec
        The codec of a compressed cache, such as that of `codec_for`.
    progress
        Called with the number of tokens that are coded.

    Raises
    ------
    InputError
        When the file cannot be written, tokens are needed and not known, or values cannot be coded.
    MismatchError
        When content, model and tokens do not belong together.
    UnsupportedError
        For what this kind of file cannot hold.
    """
    if kind in (DUMP, COMPRESSED):
        dump = _as_dump(content, model, name)
        if kind == DUMP:
            write_dump(path, dump)
            return
        codec = codec or codec_for(Content(dump))
        blob = codec.compress_dump(dump, progress)
        with atomic_write(path) as file:
            file.write(blob)
        return
    cache = _as_cache(content, model)
    if kind == LIVE:
        cache = live_cache(model, method, plain_cache(model, cache))
        content.cache = None
        save_cache(path, model, cache, notes=None if content.tokens is None else {"tokens": content.tokens})
        return
    if any(isinstance(entry, LayerCache) for entry in stock.entries(cache)):
        cache, content.cache = plain_cache(model, cache), None
    layout = LAYOUTS[kind == OLD_PROMPT]
    name = lm.name_for_mlx_lm(name)
    write_prompt_cache(path, model, cache, name=name, tokens=content.tokens, texts=content.texts, layout=layout)


def _as_dump(content: Content, model: Any, name: str) -> KVDump:
    """Return the dump, of a prompt cache a new one."""
    if content.dump is not None:
        return content.dump
    if content.tokens is None:
        raise InputError("the tokens of this cache are not known, and files of this kind name them")
    cache, content.cache = plain_cache(model, content.cache or []), None
    return lm.extract_cache(cache, cache_spec(model), [content.tokens], model=name, fingerprint=fingerprint(model))


def _as_cache(content: Content, model: Any) -> list[Any]:
    """Return the prompt cache, of a dump a new one."""
    if content.cache is None:
        dump = content.dump
        assert dump is not None
        if dump.tokens.shape[0] != 1:
            raise UnsupportedError(
                f"the cache is of {dump.tokens.shape[0]} texts; live and prompt caches are made of one"
            )
        content.cache, content.tokens, content.dump = lm.restore(model, dump), dump.tokens[0].tolist(), None
    return content.cache


def find_tokens(content: Content, model: Any, tokenizer: Any, text: str) -> tuple[list[int], str]:
    """Tokenize the text that a cache is of as it was when the cache was made.

    The number of tokens has to be the cache's, and what the model keeps of them in its first layer what the cache holds, but
    for rounding. Where that layer has a window or is none of attention, the first 64 tokens are compared, in the first layer
    that keeps all.

    Parameters
    ----------
    content
        A prompt cache.
    model, tokenizer
        Its model and tokenizer.
    text
        The text; or the message of a user, which was put into the model's chat template.

    Returns
    -------
    tuple
        Token ids, and how they were found, for people.

    Raises
    ------
    MismatchError
        When no way of tokenizing the text gives such tokens.
    """
    ways = _tokenized(tokenizer, text)
    fitting = {way: tokens for way, tokens in ways.items() if len(tokens) == content.length}
    for way, tokens in fitting.items():
        if begins_with(content, model, tokens):
            return tokens, way
    if fitting:
        raise MismatchError("the text has as many tokens as the cache, but the cache was made of others", _OTHERS)
    counts = ", ".join(f"{len(tokens)} {way}" for way, tokens in ways.items())
    raise MismatchError(f"the cache holds {content.length} tokens, the text has {counts}", _OTHERS)


_OTHERS = "give the whole text, answers included, that is in the cache; or its token ids with --tokens"


def begins_with(content: Content, model: Any, tokens: Sequence[int]) -> bool:
    """Return whether a prompt cache can be of a text, by what the model keeps of its tokens, or of the first 64.

    Parameters
    ----------
    content
        A prompt cache.
    model
        Its model.
    tokens
        Token ids, which the model knows; 1 or more.

    Returns
    -------
    bool
        True also where no layer keeps these tokens.
    """
    spec = cache_spec(model)
    whole = [i for i in spec.attention_layers if not spec.layers[i].latent] or list(spec.attention_layers)  # type: ignore[union-attr]
    if not whole:
        return True
    layer, held = whole[0], stock.entries(plain_cache(model, content.cache or []))[whole[0]]
    latent = spec.layers[layer].latent  # type: ignore[union-attr]
    # The first layer reads tokens alone; learned positions are in them, and a text in the middle would get others.
    alone = layer == 0 and (latent or any(slot.rope for slot in spec.layers[0]))  # type: ignore[union-attr]
    found = held.keys_and_values()[0 if latent else 1]
    # Latents, which stand first, and values are not rotated, and no few of their dims are large in all tokens.
    for start in range(0, len(tokens) if alone else 1, _CHUNK):
        stop, first = min(len(tokens), start + (_CHUNK if alone else _COMPARED)), max(0, start - _BEFORE)
        fresh = make_prompt_cache(model)
        model(mx.array([list(tokens[first:stop])]), cache=fresh)  # of which only this layer is computed
        kept = stock.entries(fresh)[layer].keys_and_values()[0 if latent else 1][0, :, start - first : stop - first]
        if not _are_alike(found[0, :, start:stop], kept):
            return False
    return True


def _are_alike(found: mx.array, expected: mx.array) -> bool:
    """Return whether values `[H, t, D]` of all tokens are the same, but for rounding to a few bits."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    distance, size = (mx.square(x).sum(axis=(0, 2)) for x in (found - expected, expected))
    usual = mx.sort(size)[size.size // 2]  # small ones are rounded to steps as large as those of others
    return bool(mx.all(distance < _FAR**2 * mx.maximum(size, usual)).item())


def check_ids(tokens: Any, tokenizer: Any, length: int, name: str) -> list[int]:
    """Check token ids from outside.

    Parameters
    ----------
    tokens
        Anything.
    tokenizer
        The model's.
    length
        How many there have to be.
    name
        Where they are from, for messages.

    Returns
    -------
    list of int
        The same.

    Raises
    ------
    InputError
        When they are no list of ids that the tokenizer knows.
    MismatchError
        When there are more or fewer.
    """
    most = max(tokenizer.get_vocab().values())
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token <= most for token in tokens):
        raise InputError(f"{name} is no list of token ids from 0 to {most}, such as [1, 2, 3]")
    if len(tokens) != length:
        raise MismatchError(f"the cache holds {length} tokens, {name} has {len(tokens)}")
    return tokens


def _tokenized(tokenizer: Any, text: str) -> dict[str, list[int]]:
    """Return the tokens of a text by how they came about: as it is, or as a user's message."""
    ways = {
        "as it is": tokenizer.encode(text),
        "without the tokens that begin texts": tokenizer.encode(text, add_special_tokens=False),
    }
    if getattr(tokenizer, "has_chat_template", False):
        message = [{"role": "user", "content": text}]
        forms: dict[str, dict[str, bool]] = {
            "in the chat template, open at its end": {"continue_final_message": True},  # as mlx_lm.cache_prompt does
            "in the chat template": {"add_generation_prompt": False},
            "in the chat template, an answer to come": {"add_generation_prompt": True},
        }
        for way, form in forms.items():
            try:
                ways[way] = list(tokenizer.apply_chat_template(message, **form))
            except Exception:  # noqa: BLE001  # templates are programs, and some refuse a form
                continue
    return ways

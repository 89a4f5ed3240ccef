"""A conversation as the tokens that a model reads: its chat template, or a plain form where it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from hashlib import blake2b
from typing import Any

from mlxkv.errors import InputError
from mlxkv.lm import text_start

Message = dict[str, str]
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_CHANNEL, _BODY = "<|channel|>", "<|message|>"
_PLAIN_STOP = "\n\nUser:"


class Template:
    """Chat template of a model, for one conversation.

    Templates that put today's date into the text get the day on which the conversation began: tomorrow its beginning, and so
    what is cached of it, is still the same.

    Parameters
    ----------
    tokenizer
        As `mlxkv.lm.load` returns it.
    began
        When the conversation began.

    Attributes
    ----------
    stops
        Texts that end an answer, beside the tokenizer's own tokens.
    """

    def __init__(self, tokenizer: Any, began: datetime) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {}
        template = getattr(tokenizer, "chat_template", None)
        self._is_plain = not getattr(tokenizer, "has_chat_template", template is not None)
        if isinstance(template, str) and _TODAY.search(template):
            dated = _TODAY.sub(lambda found: json.dumps(began.strftime(found[2]), ensure_ascii=False), template)
            self._options["chat_template"] = dated
        self._text = template if isinstance(template, str) else "" if self._is_plain else repr(type(tokenizer))
        self._has_channels = _CHANNEL in self._text
        self.stops: tuple[str, ...] = (_PLAIN_STOP,) if self._is_plain else ()

    @property
    def digest(self) -> str:
        """Short name of the template's text; "plain" where there is none."""
        return "plain" if self._is_plain else blake2b(self._text.encode(), digest_size=8).hexdigest()

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> list[int]:
        """Return the tokens of a conversation, from its first.

        Parameters
        ----------
        messages
            Dictionaries with a `role` ("system", "user" or "assistant") and a `content`; at least one.
        answer
            Whether they end with the beginning of the next answer.

        Returns
        -------
        list of int
            Token ids.

        Raises
        ------
        InputError
            When the template refuses the conversation, as some do with a system prompt.
        """
        if self._is_plain:
            text = plain_text(messages) + ("Assistant:" if answer else "")
            return [*text_start(self._tokenizer), *self._tokenizer.encode(text, add_special_tokens=False)]
        try:
            found = self._tokenizer.apply_chat_template(
                [self._told(message) for message in messages], add_generation_prompt=answer, **self._options
            )
        except Exception as error:  # of Jinja, or of whatever the template's own code raises
            raise InputError(
                f"the model's chat template refuses this conversation: {str(error)[:200] or type(error).__name__}"
            ) from error
        return [int(token) for token in found]

    def _told(self, message: Message) -> Message:
        """Return a message as the template takes it: gpt-oss thinks in channels, and its template takes the last one alone."""
        content = message["content"]
        if self._has_channels and message["role"] == "assistant" and _CHANNEL in content:
            content = content.rpartition(_BODY)[2]
        return {**message, "content": content}


def plain_text(messages: Sequence[Message]) -> str:
    r"""Return a conversation as text, for models that have no template.

    Parameters
    ----------
    messages
        As for `Template.render`.

    Returns
    -------
    str
        Paragraphs that begin with who speaks; a system prompt stands alone.

    Examples
    --------
    >>> plain_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'Be brief.\n\nUser: Hi\n\n'
    """
    names = {"user": "User: ", "assistant": "Assistant: "}
    return "".join(f"{names.get(message['role'], '')}{message['content'].strip()}\n\n" for message in messages)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts begin with alike.

    Parameters
    ----------
    first, second
        Token ids.

    Returns
    -------
    int
        0 to the length of the shorter.

    Examples
    --------
    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for count, (one, other) in enumerate(zip(first, second)):
        if one != other:
            return count
    return min(len(first), len(second))

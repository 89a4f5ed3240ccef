"""mlxkv generate: text from a prompt, in a new cache or in one that a file holds."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlxkv.cli._beginnings import Beginning, new_cache, read_beginning
from mlxkv.cli._checks import Limit, at_least_1, read_size
from mlxkv.cli._commands import commands
from mlxkv.cli._files import read_prompt
from mlxkv.cli._names import Cache, Model
from mlxkv.cli._output import Artifacts, Json, format_value, note, print_record, printable, progress_bar
from mlxkv.cli._sampling import MinP, Sampling, Seed, Temp, TopK, TopP, XtcProbability, XtcThreshold
from mlxkv.cli._saving import check_saving
from mlxkv.cli._work import ending_at_interrupt, load_model, working


@commands.register("generate")
def generate_command(
    model: Model,
    file: Annotated[
        Path | None, typer.Argument(help="A cache to go on from: .mlxkv, .npz, .cache or .safetensors.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to read; - is stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="A text file to read instead.")] = None,
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="For the chat template.")] = None,
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Read a text, not a message.")
    ] = False,
    cache: Cache = None,
    artifacts: Artifacts = None,
    adapter_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A LoRA adapter of the model.")] = None,
    max_tokens: Annotated[
        int,
        typer.Option(metavar="N", help="Most tokens to generate (128).", show_default=False, callback=at_least_1),
    ] = 128,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the cache: .mlxkv, .cache, .safetensors or .npz."),
    ] = None,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    top_k: TopK = 0,
    xtc_probability: XtcProbability = 0.0,
    xtc_threshold: XtcThreshold = 0.1,
    seed: Seed = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Generate text: an answer to a message where the model has a chat template; after a FILE, more of its text.

    Example: mlxkv generate --model smollm2-135m --prompt "Name three rivers."

    Example: mlxkv generate notes.mlxkv --model smollm2-135m --prompt " In short:" --save notes.mlxkv
    """
    sampling = Sampling(temp, top_p, min_p, top_k, xtc_probability, xtc_threshold, seed)
    sampling.check()
    _check(file, artifacts, cache, system_prompt, ignore_chat_template)
    text = _text(prompt, prompt_file)
    begun = new_cache(cache) if file is None else read_beginning(file, artifacts, read_size(limit), model)
    saving = check_saving(save, begun, file, artifacts)
    loaded, tokenizer = load_model(model, adapter_path)
    tokens = _tokens(tokenizer, text, system_prompt, ignore_chat_template, file)
    with working("making the cache"):
        caches = begun.make(loaded)
    if saving:
        saving.check_cache(caches)
    cached = _seen(caches, begun, file)
    run = _Run(loaded, tokenizer, tokens, caches)
    run.generate(max_tokens, sampling, show=not json)
    if not json:
        print("\n")
    facts = run.facts() | ({} if file is None else {"cached_tokens": cached}) | _held(loaded, caches)
    if saving:
        read = None if begun.tokens is None else [*begun.tokens, *tokens, *run.generated]
        facts |= saving.write(loaded, model, caches, read)
    if json:
        print_record({"text": run.text, **facts}, as_json=True)
    else:
        # Of a plain cache the ratio tells of rows that mlx-lm allocates ahead, and of float32 on a CPU.
        _print_line({key: value for key, value in facts.items() if cache or key not in ("fp16_bytes", "ratio")})


@dataclass
class _Run:
    """A text as it is generated, which is in its cache, token for token, whenever it ends."""

    model: Any
    tokenizer: Any
    prompt: list[int]
    cache: list[Any]
    text: str = ""
    generated: list[int] = field(default_factory=list)
    last: Any = None  # mlx-lm's last response
    ended: str | None = None

    def generate(self, most: int, sampling: Sampling, show: bool) -> None:
        """Read the prompt, and generate so many tokens at most; print the text as it comes."""
        from mlx_lm import stream_generate

        sampler = sampling.make(self.tokenizer)
        done = 0
        with progress_bar("reading the prompt", len(self.prompt)) as advance:

            def progress(read: int, _: int) -> None:
                nonlocal done
                advance(read - done)
                done = read

            responses = stream_generate(
                self.model, self.tokenizer, self.prompt, most, sampler=sampler, prompt_cache=self.cache,
                prompt_progress_callback=progress,
            )  # fmt: skip
            first = next(responses)
        with working("generating", spin=False), ending_at_interrupt() as asked:
            self._take(first, show)
            while self.ended is None and not asked():
                self._take(next(responses), show)
            if self.ended is None:
                responses.close()
                self.ended = "interrupted"
                self._show(self._held_back(), show)

    def facts(self) -> dict[str, Any]:
        """Return numbers of tokens and their speed."""
        return {
            "prompt_tokens": len(self.prompt),
            "prompt_tokens_per_second": self.last.prompt_tps,
            "generated_tokens": len(self.generated),
            "tokens_per_second": self.last.generation_tps,
            "finish_reason": self.ended,
        }

    def _take(self, response: Any, show: bool) -> None:
        """Add what mlx-lm has generated."""
        self.generated.append(int(response.token))
        self.last, self.ended = response, response.finish_reason
        self._show(response.text, show)

    def _show(self, text: str, show: bool) -> None:
        self.text += text
        if show:
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)

    def _held_back(self) -> str:
        """Return the last word, which some of mlx-lm's tokenizers show only when the next one begins."""
        whole, shown = self.tokenizer.decode(self.generated).lstrip(" "), self.text.lstrip(" ")
        return whole[len(shown) :] if whole.startswith(shown) else ""


def _check(file: Path | None, artifacts: Path | None, cache: str | None, system: str | None, plain: bool) -> None:
    """Raise InputError for options that do not go together."""
    from mlxkv.errors import InputError

    if file is not None and cache is not None:
        raise InputError("give either the FILE of a cache to go on from, or --cache with a live preset to start in")
    if file is None and artifacts is not None:
        raise InputError("--artifacts belongs to a compressed FILE to go on from")
    if system is not None and (file is not None or plain):
        why = "after a FILE, whose text goes on as it is" if file is not None else "with --ignore-chat-template"
        raise InputError(f"--system-prompt has no place {why}")


def _text(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt; where no option names it, what is piped in."""
    from mlxkv.errors import InputError

    piped = prompt is None and prompt_file is None and sys.stdin is not None and not sys.stdin.isatty()
    if piped or (prompt == "-" and prompt_file is None):
        prompt, prompt_file = None, Path("-")
    if not (text := read_prompt(prompt, prompt_file)):
        raise InputError(
            "the prompt is empty: it has no tokens", "--prompt TEXT or --prompt-file FILE" if piped else ""
        )
    return text


def _tokens(tokenizer: Any, text: str, system: str | None, plain: bool, file: Path | None) -> list[int]:
    """Return the tokens of the prompt: of a user's message where the model has a chat template, else of the text."""
    from mlxkv.errors import InputError
    from mlxkv.session.templates import Template

    has_template = tokenizer.has_chat_template
    if file is not None and has_template and not plain:
        note(
            f"the prompt goes on with the text in {file} as it is, without the chat template; mlxkv chat holds conversations"
        )
    if system is not None and not has_template:
        raise InputError(
            "this model has no chat template, and so no place for --system-prompt", "put it into the prompt"
        )
    if file is None and has_template and not plain:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return Template(tokenizer, datetime.now()).render([*messages, {"role": "user", "content": text}])
    # A restored cache already holds the start of the text, so no start token then.
    tokens = list(tokenizer.encode(text, add_special_tokens=file is None))
    if not tokens:
        raise InputError("the prompt has no tokens")
    return tokens


def _seen(caches: list[Any], begun: Beginning, file: Path | None) -> int:
    """Return how many tokens the cache holds; raise FormatError where the file names others."""
    from mlxkv.errors import FormatError
    from mlxkv.stock import entries

    seen = max((getattr(entry, "offset", 0) for entry in entries(caches)), default=0)
    if begun.tokens is not None and len(begun.tokens) != seen:
        raise FormatError(f"{file} names {len(begun.tokens)} tokens, and its cache has seen {seen}")
    return seen


def _held(model: Any, caches: list[Any]) -> dict[str, Any]:
    from mlxkv.evaluate.variants import cache_sizes

    held = cache_sizes(model, caches)
    return {key: held[key] for key in ("cache_bytes", "fp16_bytes", "ratio")}


def _print_line(facts: dict[str, Any]) -> None:
    line = ", ".join(f"{key.replace('_', ' ')} {format_value(key, value)}" for key, value in facts.items())
    console = Console(highlight=False, markup=False)
    console.print(line, soft_wrap=not console.is_terminal)

"""What a store writes and gives back, in this process: bytes and predictions of prefixes, a long conversation, and a branch of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.raw_server import load_raw, save_raw
from benchmarks.serving import written_bytes
from mlxkv import lm
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import CachedContext, Variant, baseline, cache_sizes
from mlxkv.store import PromptStore, Store

MODES: dict[str, dict[str, Any]] = {"calibrated": {}, "uncalibrated": {}, "exact": {"exact": True}}
RAW = {"mlx-lm's file": None, "mlx-lm's file, 16 bits": 16}
KEPT = ("kl", "top1_agreement", "predicted_tokens", "tokens", "file_bytes", "folder_bytes", "fetched", "fetch_seconds",
        "coding")  # fmt: skip


@contextmanager
def library(folder: Path) -> Iterator[None]:
    """Make a folder the library of artifacts of this process, and of those that it starts."""
    before = os.environ.get("MLXKV_ARTIFACTS")
    os.environ["MLXKV_ARTIFACTS"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MLXKV_ARTIFACTS")
        if before is not None:
            os.environ["MLXKV_ARTIFACTS"] = before


def size_of(folder: Path, whole: bool = False) -> int:
    """Return the bytes of a store's block and state files, or of everything in its folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and (whole or path.suffix == ".mlxkv")]
    return sum(path.stat().st_size for path in files)


def prefixes(
    model: Any, passages: dict[str, list[int]], length: int, predict: int, libraries: dict[str, Path], work: Path
) -> list[dict[str, Any]]:
    """Store a prefix of each text in every mode, read it back, and compare the predictions of what comes next.

    Parameters
    ----------
    model
        A loaded model.
    passages
        Tokens of texts by name, `length` + `predict` + 1 of each.
    length, predict
        Tokens of the prefix, and predicted after the next.
    libraries
        For each mode of `MODES` the library of artifacts.
    work
        A folder for stores.

    Returns
    -------
    list of dict
        A record for each text and mode, those of `RAW` first: divergence, and bytes of its files and of everything.
    """
    records = []
    for text, tokens in passages.items():
        with opened(model, libraries, work / text) as prompts:
            variants = [raw_variant(name, bits, work / "raw.safetensors") for name, bits in RAW.items()]
            variants += [stored_variant(mode, each, work / text / mode) for mode, each in prompts.items()]
            found = fidelity.evaluate(model, [baseline(), *variants], tokens, length, chunk=predict)[1:]
        records += [{"text": text, "mode": record["variant"], **{key: record[key] for key in KEPT}} for record in found]
    return records


@contextmanager
def opened(model: Any, libraries: dict[str, Path], work: Path) -> Iterator[dict[str, PromptStore]]:
    """Open a store for each mode, each in a folder of its own."""
    stores: list[Store] = []
    prompts = {}
    for mode, folder in libraries.items():
        with library(folder):
            stores.append(Store(work / mode))
            prompts[mode] = stores[-1].for_model(model, **MODES[mode])
    try:
        yield prompts
    finally:
        for store in stores:
            store.close()


def stored_variant(name: str, prompts: PromptStore, folder: Path) -> Variant:
    """Return the cache that comes back from a store: its newest tokens computed again, where the store leaves those to the model."""

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        assert exact is not None
        prompts.insert(tokens, copy.deepcopy(exact.cache), "system")
        if not prompts.flush(300):
            raise RuntimeError(f"the store has not written {len(tokens)} tokens in 300 seconds")
        start = perf_counter()
        found = prompts.fetch([*tokens, tokens[0]])
        seconds = perf_counter() - start
        if found is None:
            raise RuntimeError(f"the store has nothing of what it was given: {prompts.statistics()}")
        if found.length < len(tokens):
            lm.prefill(model, tokens[found.length :], found.cache)
        details = {
            "file_bytes": size_of(folder), "folder_bytes": size_of(folder, whole=True), "fetched": found.length,
            "fetch_seconds": seconds, "coding": prompts.statistics()["coding"],
        }  # fmt: skip
        return CachedContext(found.cache, cache_sizes(model, exact.cache), details)

    return Variant(name, {}, build, needs_baseline=True)


def raw_variant(name: str, bits: int | None, path: Path) -> Variant:
    """Return the cache that comes back from mlx-lm's own file, in numbers as the model computes or of 16 bits."""

    def build(model: Any, tokens: Sequence[int], exact: CachedContext | None = None) -> CachedContext:
        assert exact is not None
        size = save_raw(path, exact.cache, bits)
        start = perf_counter()
        cache = load_raw(path, bits)
        mx.eval([entry.state for entry in cache])
        details = {
            "file_bytes": size, "folder_bytes": size, "fetched": len(tokens), "fetch_seconds": perf_counter() - start,
            "coding": "safetensors",
        }  # fmt: skip
        return CachedContext(cache, cache_sizes(model, exact.cache), details)

    return Variant(name, {}, build, needs_baseline=True)


def state_bytes(cache: list[Any], bits: int | None = None) -> int:
    """Return the bytes of a cache's arrays as mlx-lm saves them: its file without its header."""
    states = [cast(list[tuple[str, Any]], tree_flatten(entry.state)) for entry in cache]
    leaves = [leaf for state in states for _, leaf in state if isinstance(leaf, mx.array)]
    return sum(
        leaf.size * 2 if bits == 16 and mx.issubdtype(leaf.dtype, mx.floating) else leaf.nbytes for leaf in leaves
    )


def conversation(
    model: Any, tokens: Sequence[int], lengths: tuple[int, int, int], turns: int, branch: int, work: Path
) -> dict[str, Any]:
    """Let a conversation grow turn by turn, stored after each, then go on from its middle in another way.

    Parameters
    ----------
    model
        A loaded model.
    tokens
        A text that all is cut from.
    lengths
        Tokens of the system prompt, of a message and of an answer.
    turns, branch
        How many the conversation has, and its branch.
    work
        A folder for the store.

    Returns
    -------
    dict
        Bytes written, by the store's own count, by the sizes of its files and as the system counted them; final bytes; what a
        file of mlx-lm's written anew each turn takes; tokens and bytes of the branch, and of those before it.
    """
    system, message, answer = lengths
    middle = system + turns // 2 * (message + answer)
    with Store(work) as store:
        prompts = store.for_model(model)
        cache, start = make_prompt_cache(model), 0
        system_writes, raw = written_bytes(os.getpid()), [0, 0]
        rows = []
        for turn in range(turns + 1):  # the first is the system prompt
            stop = system + turn * (message + answer)
            lm.prefill(model, tokens[start : stop - answer if turn else stop], cache)
            if turn:
                lm.prefill(model, tokens[stop - answer : stop], cache)
            keep(prompts, tokens[:stop], cache, "assistant" if turn else "system", (stop - answer,) if turn else ())
            raw = [raw[0] + state_bytes(cache), raw[1] + state_bytes(cache, 16)]
            rows.append({"tokens": stop, "files": size_of(work), "written": prompts.statistics()["bytes_written"]})
            start = stop
        found = {
            "turns": turns, "tokens": start, "written_bytes": rows[-1]["written"], "final_bytes": rows[-1]["files"],
            "folder_bytes": size_of(work, whole=True), "grown": rows[:: max(1, turns // 10)],
            "raw_bytes": state_bytes(cache), "raw_written_bytes": raw[0], "raw_written_bytes_16": raw[1],
        }  # fmt: skip
        after = written_bytes(os.getpid())
        found["system_written_bytes"] = (
            after - system_writes if after is not None and system_writes is not None else None
        )
        found["coding"] = prompts.statistics()["coding"]
        return found | branched(model, prompts, tokens, middle, branch * (message + answer), work)


def keep(prompts: PromptStore, tokens: Sequence[int], cache: list[Any], kind: str, cuts: Sequence[int]) -> None:
    """Store a cache and wait until it is written."""
    prompts.insert(tokens, copy.deepcopy(cache), kind, cuts)
    if not prompts.flush(300):
        raise RuntimeError(f"the store has not written {len(tokens)} tokens in 300 seconds")


def branched(
    model: Any, prompts: PromptStore, tokens: Sequence[int], middle: int, more: int, work: Path
) -> dict[str, Any]:
    """Go on from the middle of a conversation with other tokens; return tokens shared and own, and the bytes that came."""
    other = [*tokens[:middle], *tokens[-more:]]
    found = prompts.fetch(other)
    if found is None:
        raise RuntimeError("the store has nothing of the conversation")
    lm.prefill(model, other[found.length :], found.cache)
    before = size_of(work)
    keep(prompts, other, found.cache, "assistant", ())
    return {
        "branch_shared": middle, "branch_fetched": found.length, "branch_tokens": more, "branch_bytes": size_of(work) - before,
    }  # fmt: skip

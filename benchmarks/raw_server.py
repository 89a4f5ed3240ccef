"""mlx_lm.server as it is, and with prompt caches behind it in files as mlx-lm saves them: what `mlxkv serve` is measured against.

python -m benchmarks.raw_server --model FOLDER --port 8080                        mlx_lm.server
python -m benchmarks.raw_server --raw-files FOLDER --bits 16 --model FOLDER       a safetensors file for each entry of its cache

A file is written when its entry is made, and the one with the longest common beginning is loaded for a prompt of which no entry in memory
has as much. All flags of mlx_lm.server pass through. Multiplied by the same BLAS as mlxkv's own server.
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from pathlib import Path
from typing import Any, cast

import mlxkv  # noqa: F401  # before mlx.core: its BLAS is to be that of both servers

# isort: split
import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, load_prompt_cache, save_prompt_cache


class FilePromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, with every entry in a file, too.

    Parameters
    ----------
    size
        Entries in memory.
    folder
        Of the files; those that are in it are found again.
    bits
        16 for numbers of two bytes in files, or None for those that the model computes with.
    """

    def __init__(self, size: int, folder: Path, bits: int | None = None) -> None:
        super().__init__(size)
        self.folder, self.bits = folder, bits
        self.files = {path.with_suffix(".safetensors"): json.loads(path.read_text()) for path in folder.glob("*.json")}

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep an entry, and write its file."""
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        save_raw(path, prompt_cache, self.bits)
        self.files[path] = {"tokens": list(tokens), "can_trim": can_trim_prompt_cache(prompt_cache)}
        path.with_suffix(".json").write_text(json.dumps(self.files[path]))

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list[Any] | None, list[int]]:
        """Find an entry, that of a file where memory has none as long."""
        found = super().fetch_nearest_cache(model, tokens)
        useful = {path: self._useful(path, tokens) for path in self.files}
        path = max(useful, key=lambda path: useful[path], default=Path())
        if useful.get(path, 0) > len(tokens) - len(found[1]):
            super().insert_cache(model, self.files[path]["tokens"], load_raw(path, self.bits))
            found = super().fetch_nearest_cache(model, tokens)
        return found

    def _useful(self, path: Path, tokens: list[int]) -> int:
        """Return how many tokens of a prompt a file saves computing."""
        known = self.files[path]
        length = common(known["tokens"], tokens)
        return length if known["can_trim"] or length == len(known["tokens"]) < len(tokens) else 0


def common(a: list[int], b: list[int]) -> int:
    """Return how many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def save_raw(path: Path, cache: list[Any], bits: int | None = None) -> int:
    """Save a cache by mlx-lm's `save_prompt_cache`, with numbers of 16 bits or as they are; return the file's bytes."""
    if bits == 16:
        cache = [type(entry).from_state(_cast(entry.state, mx.float16)) for entry in cache]
    save_prompt_cache(str(path), cache)
    return path.stat().st_size


def load_raw(path: Path, bits: int | None = None) -> list[Any]:
    """Load a cache that `save_raw` saved, in numbers of 32 bits where they were saved in 16."""
    cache = cast(list[Any], load_prompt_cache(str(path)))  # type: ignore[no-untyped-call]
    return [type(entry).from_state(_cast(entry.state, mx.float32)) for entry in cache] if bits == 16 else cache


def _cast(state: Any, dtype: mx.Dtype) -> Any:
    def one(value: Any) -> Any:
        return value.astype(dtype) if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating) else value

    return tree_map(one, state)


def main() -> None:
    """Run mlx_lm.server."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--raw-files", type=Path)
    parser.add_argument("--bits", type=int, choices=(16,))
    own, sys.argv[1:] = parser.parse_known_args()
    if own.raw_files:
        # mlx_lm.server takes no other cache than the one of this name.
        server.LRUPromptCache = lambda size: FilePromptCache(size, own.raw_files, own.bits)  # type: ignore
    server.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()

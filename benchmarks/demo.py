"""The main job on a real language model, from nothing: dump, calibrate, compress, decompress, restore, compare.

make demo                         (or: python -m benchmarks.demo)
make demo MODEL=gemma3-270m       on Gemma 3, most of whose layers see 512 tokens back
"""

from __future__ import annotations

import argparse
import copy
import shlex
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.markup import escape

from benchmarks import texts
from benchmarks.schema import MODEL, NAMED
from mlxkv import lm
from mlxkv.cli import build
from mlxkv.cli._output import print_record, print_table
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant, live_variant
from mlxkv.models import cache_spec

CALIBRATION = (5, 1536)  # texts, tokens of each
LENGTH, PREDICT, SPOKEN = 2048, 200, 40
LIVE = ("int8", "int4")
PRESETS = {MODEL: "--preset smollm2"}  # which check that it is the model they are for
SHOWN = (
    "tokens", "fp16_bytes", "file_bytes", "ratio", "ratio_middle", "k_relative_error", "v_relative_error",
    "perplexity_reference", "perplexity", "perplexity_delta", "kl", "top1_agreement",
    "compress_seconds", "decompress_seconds", "prefill_seconds", "artifact_bytes",
)  # fmt: skip
COLUMNS = ("variant", "cache_bytes", "ratio", "kl", "top1_agreement", "perplexity")
console = Console()


def main() -> None:
    """Run everything in a temporary folder and end with two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODEL, help=f"{' or '.join(NAMED)}, or any that mlx-lm loads")
    show(parser.parse_args().model)


def show(name: str) -> None:
    """Show the whole path on a model, and what it notices."""
    begin = perf_counter()
    with tempfile.TemporaryDirectory(prefix="mlxkv-demo-") as work:
        folder = Path(work)
        console.print(f"[bold]1.[/] Load {name} and hold out a text")
        model, tokenizer = lm.load(name)
        files = _calibration_dumps(model, tokenizer, name, folder)
        console.print("[bold]2.[/] Learn a basis and a bit plan from dumps of other texts")
        _run(
            f"calibrate --method kvtc-8 --rank 2048 {PRESETS.get(name, '')} --out",
            folder / "artifacts", "--npz", *files,
        )  # fmt: skip
        console.print(f"[bold]3.[/] Prefill {LENGTH} held-out tokens, dump the cache, compress it and get it back")
        held_out = texts.same_kind(tokenizer, LENGTH + PREDICT + 1, 1)[0]
        exact = baseline().build(model, held_out[:LENGTH])
        taken = lm.extract_cache(
            exact.cache, cache_spec(model), [held_out[:LENGTH]],
            model=name, fingerprint=lm.fingerprint(model), dtype="float16",
        )  # fmt: skip
        write_dump(folder / "cache.npz", taken)
        _run(
            "compress --npz", folder / "cache.npz", "--artifacts", folder / "artifacts", "--out", folder / "cache.mlxkv"
        )
        _run("decompress", folder / "cache.mlxkv", "--artifacts", folder / "artifacts", "--out", folder / "back.npz")
        console.print("[bold]4.[/] Restore the cache into mlx-lm and let the model go on from both")
        _speak(model, tokenizer, held_out[LENGTH], exact.cache, read_dump(folder / "back.npz"))
        console.print(f"[bold]5.[/] Read the same text into live caches, {' and '.join(LIVE)}, and compare everything")
        codec = CacheCodec(CalibrationArtifacts.from_dir(folder / "artifacts"))
        # The first and the file begin with what has just been prefilled.
        ways = [replace(baseline(), build=lambda *_: exact), codec_variant(codec, "kvtc-8", "float16")]
        ways += [live_variant(live) for live in LIVE]
        records = fidelity.evaluate(model, ways, held_out, LENGTH, chunk=PREDICT)
        facts = {**records[1], "prefill_seconds": records[0]["prefill_seconds"]}
        print_record({key: facts[key] for key in SHOWN}, as_json=False, title="does the model notice the file?")
        rows = [{key: record[key] for key in COLUMNS} for record in records]
        print_table(rows, as_json=False, title="and live caches?")
    console.print(f"{perf_counter() - begin:.0f} seconds in all, without set-up")


def _calibration_dumps(model: Any, tokenizer: Any, name: str, folder: Path) -> list[Path]:
    count, length = CALIBRATION
    files = []
    for index, tokens in enumerate(texts.calibration(tokenizer, length, count)):
        files.append(folder / f"calibration-{index}.npz")
        write_dump(files[-1], lm.dump(model, tokens, name=name, dtype="float16"))
        console.print(f"   {files[-1].name}: {length} tokens of Python's documentation")
    return files


def _run(command: str, *arguments: object) -> None:
    words = [*command.split(), *map(str, arguments)]
    console.print(
        f"   [dim]$ mlxkv {shlex.join(Path(word).name if '/' in word else word for word in words)}[/]", soft_wrap=True
    )
    build()(words, standalone_mode=False)


def _speak(model: Any, tokenizer: Any, first: int, live: list[Any], back: KVDump) -> None:
    for label, cache in (("live cache    ", copy.deepcopy(live)), ("restored cache", lm.restore(model, back))):
        generated = lm.continue_greedily(model, cache, lm.prefill(model, [first], cache))
        text = tokenizer.decode([first, *islice(generated, SPOKEN)])
        console.print(f"   [bold]{label}[/]  …{escape(' '.join(text.split()))}…", highlight=False)


if __name__ == "__main__":
    main()

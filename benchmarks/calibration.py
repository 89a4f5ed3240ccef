"""Calibrating codecs for experiments: on Python's documentation, several methods and ratios from one set of dumps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks import texts
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.base import CodecConfig
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.sensitivity import sensitivity

FULL = {"texts": 20, "tokens": 1536}
QUICK = {"texts": 2, "tokens": 768, "rank": 512}


@contextmanager
def dumps(model: Any, tokenizer: Any, size: dict[str, int]) -> Iterator[list[Path]]:
    """Yield dumps to calibrate on, with their sensitivity.

    Parameters
    ----------
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    size
        `texts` and the `tokens` of each.

    Yields
    ------
    list of Path
        Files that are removed afterwards.
    """
    stretches = texts.calibration(tokenizer, size["tokens"], size["texts"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.npz" for i in range(len(stretches))]
        for file, tokens in zip(files, track(stretches, "calibration dumps")):
            dump = lm.dump(model, tokens, dtype="float16")
            write_dump(file, replace(dump, sensitivity=sensitivity(model, tokens)))
        yield files


def learn(files: list[Path], configs: Sequence[CodecConfig]) -> list[CalibrationArtifacts]:
    """Return artifacts by each of some settings, from the same dumps."""
    return [calibrate(files, config) for config in track(configs, "calibration")]


def codecs(
    model: Any, tokenizer: Any, size: dict[str, int], ratios: Sequence[float], qualities: Sequence[float]
) -> dict[str, CacheCodec]:
    """Calibrate `kvtc` at each ratio and one `kvtc-rd` for all qualities on the same texts.

    Parameters
    ----------
    model, tokenizer
        As `mlxkv.lm.load` returns them.
    size
        As `dumps` takes it, and the `rank` of `kvtc` where it is not the method's own.
    ratios, qualities
        Of `kvtc` and `kvtc-rd`.

    Returns
    -------
    dict of CacheCodec
        By names such as kvtc-4 and kvtc-rd-22.
    """
    with dumps(model, tokenizer, size) as files:
        published = learn(files, [KVTCConfig(ratio, rank=size.get("rank")) for ratio in ratios])
        (ours,) = learn(files, [KVTCRDConfig()])
    made = {f"kvtc-{ratio}": CacheCodec(found) for ratio, found in zip(ratios, published)}
    return made | {f"kvtc-rd-{quality}": CacheCodec(ours).with_quality(quality) for quality in qualities}

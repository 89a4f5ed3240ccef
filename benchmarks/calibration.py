"""Calibrating codecs for benchmarks: on Python's documentation, at several ratios from one set of dumps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.progress import track

from benchmarks import texts
from benchmarks.held_out import MODEL
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods import kvtc, kvtc_rd
from mlxkv.codec.methods.kvtc import MAX_DEFAULT_RANK, KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages import pca
from mlxkv.dump import write_dump
from mlxkv.sensitivity import sensitivity

FULL = {"texts": 20, "tokens": 1536}
QUICK = {"texts": 2, "tokens": 768, "rank": 512}


def calibrated(
    model: Any, tokenizer: Any, size: dict[str, int], ratios: Sequence[float]
) -> dict[float, CalibrationArtifacts]:
    """`kvtc` artifacts for each ratio. size: texts, tokens of each, and the rank where it is not the method's own."""
    with dumps(model, tokenizer, size) as files:
        return dict(zip(ratios, learnt(files, [KVTCConfig(ratio, rank=size.get("rank")) for ratio in ratios])))


def codecs(
    model: Any, tokenizer: Any, size: dict[str, int], ratios: Sequence[float], qualities: Sequence[float]
) -> dict[str, CacheCodec]:
    """`kvtc` at each ratio and one `kvtc-rd` at each quality, by name, calibrated on the same texts."""
    with dumps(model, tokenizer, size, sensitivity) as files:
        published = learnt(files, [KVTCConfig(ratio, rank=size.get("rank")) for ratio in ratios]) if ratios else []
        ours = CacheCodec(calibrate(files, kvtc_rd.KVTCRDConfig()))
    made = {f"kvtc-{ratio}": CacheCodec(found) for ratio, found in zip(ratios, published)}
    return made | {f"kvtc-rd-{quality}": ours.with_quality(quality) for quality in qualities}


@contextmanager
def dumps(
    model: Any, tokenizer: Any, size: dict[str, int], measure: Callable[[Any, list[int]], Any] | None = None
) -> Iterator[list[Path]]:
    """Files to calibrate on, each with the sensitivity that `measure` finds, if it is given."""
    stretches = texts.calibration(tokenizer, size["tokens"], size["texts"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.npz" for i in range(len(stretches))]
        for file, tokens in zip(files, track(stretches, "calibration dumps")):
            dump = lm.dump(model, tokens, name=MODEL, dtype="float16")
            write_dump(file, replace(dump, sensitivity=measure(model, tokens) if measure else {}))
        yield files


def learnt(files: list[Path], settings: Sequence[KVTCConfig]) -> list[CalibrationArtifacts]:
    """Artifacts by each of some settings that differ in their ratio.

    Principal components and errors of groups are the same for all ratios, and most of the seconds: they are found once.
    """
    errors: dict[bytes, dict[tuple[int, str], np.ndarray]] = {}
    measure = kvtc.group_errors

    def group_errors(coefficients: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
        first = coefficients[0].tobytes()
        if first not in errors:
            errors[first] = measure(coefficients)
        return errors[first]

    most = settings[0].rank or MAX_DEFAULT_RANK
    with components_found_once(kvtc, most), mock.patch.object(kvtc, "group_errors", group_errors):
        return [calibrate(files, each) for each in track(settings, "calibration")]


@contextmanager
def components_found_once(module: Any, most: int) -> Iterator[None]:
    """Principal components of equal rows are found once, up to `most`, by a module that imports the function."""
    found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def components(rows: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        first = rows[0].tobytes()  # tells keys from values
        if first in found:
            rows -= found[first][0]  # as principal_components does
        else:
            found[first] = pca.principal_components(rows, most, seed)
        return found[first][0], found[first][1][:, :rank]

    with mock.patch.object(module, "principal_components", components):
        yield

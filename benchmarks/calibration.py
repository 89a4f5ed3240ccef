"""Calibrating kvtc for benchmarks: on Python's documentation, at several ratios from one set of dumps."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.progress import track

from benchmarks import texts
from benchmarks.held_out import MODEL
from mlxkv import lm
from mlxkv.codec import kvtc, pca
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import MAX_DEFAULT_RANK, Settings
from mlxkv.files import write_dump

FULL = {"texts": 20, "tokens": 1536}
QUICK = {"texts": 2, "tokens": 768, "rank": 512}


def calibrated(
    model: Any, tokenizer: Any, size: dict[str, int], ratios: Sequence[float]
) -> dict[float, CalibrationArtifacts]:
    """Artifacts for each ratio. size: texts, tokens of each, and the rank where it is not the method's own.

    Principal components are the same for all ratios, and most of the seconds, so they are found once.
    """
    most = size.get("rank", MAX_DEFAULT_RANK)
    found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def components(rows: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        first = rows[0].tobytes()  # tells keys from values
        if first in found:
            rows -= found[first][0]  # as principal_components does
        else:
            found[first] = pca.principal_components(rows, most, seed)
        return found[first][0], found[first][1][:, :rank]

    stretches = texts.calibration(tokenizer, size["tokens"], size["texts"])
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(kvtc, "principal_components", components):
        files = [Path(folder) / f"{i}.npz" for i in range(len(stretches))]
        for file, tokens in zip(files, track(stretches, "calibration dumps")):
            write_dump(file, lm.dump(model, tokens, name=MODEL, dtype="float16"))
        return {
            ratio: calibrate(files, Settings(ratio, rank=size.get("rank"))) for ratio in track(ratios, "calibration")
        }

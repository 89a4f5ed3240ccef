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
from mlxkv.codec import calibrate, pca
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.kvtc import MAX_DEFAULT_RANK, Settings
from mlxkv.files import write_dump

FULL = {"texts": 20, "tokens": 1536}
QUICK = {"texts": 2, "tokens": 768}


def calibrated(
    model: Any, tokenizer: Any, size: dict[str, int], ratios: Sequence[float]
) -> dict[float, CalibrationArtifacts]:
    """Artifacts for each ratio. Their principal components are the same, and most of the seconds, so they are found once."""
    found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def components(rows: np.ndarray, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        first = rows[0].tobytes()  # tells keys from values
        if first in found:
            rows -= found[first][0]  # as principal_components does
        else:
            found[first] = pca.principal_components(rows, MAX_DEFAULT_RANK, seed)
        return found[first][0], found[first][1][:, :rank]

    stretches = texts.calibration(tokenizer, size["tokens"], size["texts"])
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(calibrate, "principal_components", components):
        files = [Path(folder) / f"{i}.npz" for i in range(len(stretches))]
        for file, tokens in zip(files, track(stretches, "calibration dumps")):
            write_dump(file, lm.dump(model, tokens, name=MODEL, dtype="float16"))
        return {ratio: calibrate.calibrate(files, Settings(ratio)) for ratio in track(ratios, "calibration")}

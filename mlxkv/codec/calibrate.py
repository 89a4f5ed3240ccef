"""Calibration: cache dumps in, a method's artifacts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlxkv
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.samples import Progress, Samples
from mlxkv.errors import InputError
from mlxkv.registry import method_module


def calibrate(
    files: Sequence[str | Path], settings: Any, progress: Progress = lambda step: None
) -> CalibrationArtifacts:
    """Artifacts of the codec method whose Settings these are, from dumps of one model. `progress` is told each step as
    it starts.

    Raises InputError when too little is left to calibrate on and MismatchError for dumps of different models.
    """
    module = method_module(type(settings).__module__.rpartition(".")[2].replace("_", "-"), ("mlxkv.codec",))
    if module is None or not isinstance(settings, module.Settings):
        raise InputError(f"{settings!r} are no settings of a codec method")
    samples = Samples(files, settings.s, settings.samples_per_file, progress)
    parts = module.train(samples, settings)
    meta = {
        "method": module.METHOD,
        "mlxkv": mlxkv.__version__,
        "model": samples.origin.model,
        "model_fingerprint": samples.origin.fingerprint,
        **dataclasses.asdict(settings),
        **module.facts(parts),
        "calibration_tokens": samples.tokens,
        "calibration_files": len(files),
    }
    return CalibrationArtifacts(parts["k"], parts["v"], samples.spec, meta)

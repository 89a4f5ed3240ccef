"""Calibration: cache dumps in, a method's artifacts out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.base import CodecConfig, CodecMethod, codec_methods
from mlxkv.codec.samples import Progress, Samples
from mlxkv.errors import InputError, PresetError
from mlxkv.presets import method_preset
from mlxkv.version import __version__


def calibrate(
    files: Sequence[str | Path], config: CodecConfig, progress: Progress = lambda step: None
) -> CalibrationArtifacts:
    """Artifacts of the codec method whose settings these are, from dumps of one model. `progress` is told each step as
    it starts.

    Raises InputError when too little is left to calibrate on and MismatchError for dumps of different models.
    """
    name, method = _method_of(config)
    samples = Samples(files, config.sinks, config.samples_per_file, progress)
    streams = method().train(samples, config)
    meta = {
        "method": name,
        "mlxkv": __version__,
        "model": samples.origin.model,
        "model_fingerprint": samples.origin.fingerprint,
        **config.to_dict(),
        **method().facts(streams),
        "calibration_tokens": samples.tokens,
        "calibration_files": len(files),
    }
    return CalibrationArtifacts(streams["k"], streams["v"], samples.spec, meta)


def codec_config(preset: str) -> CodecConfig:
    """Settings of the codec method that a preset names. Raises PresetError for a live method's preset."""
    found = method_preset(preset)
    if (method := codec_methods.find(found.method)) is None:
        raise PresetError(f"{preset!r} is of the live method {found.method}: it takes no calibration; use --cache")
    return found.config(method.config_class)


def _method_of(config: CodecConfig) -> tuple[str, type[CodecMethod]]:
    for name, method in codec_methods.items():
        if method.config_class is type(config):
            return name, method
    raise InputError(f"{config!r} are no settings of a codec method: those are {', '.join(codec_methods.names())}")

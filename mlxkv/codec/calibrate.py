"""Calibration: learn a method's artifacts from cache dumps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.base import CodecConfig, CodecMethod, codec_methods
from mlxkv.codec.samples import Progress, Samples
from mlxkv.errors import InputError, PresetError, suggest
from mlxkv.presets import method_preset, preset_names, presets_of
from mlxkv.version import __version__


def calibrate(
    files: Sequence[str | Path], config: CodecConfig, progress: Progress = lambda step: None
) -> CalibrationArtifacts:
    """Learn the artifacts of a codec method from dumps of one model.

    Parameters
    ----------
    files
        Dumps that `mlxkv dump` or `mlxkv.write_dump` wrote. The methods `kvtc-rd` and `kvtc-weighted` need a sensitivity in at
        least one of them.
    config
        Settings; their class decides the method.
    progress
        Called with the name of each step as it starts.

    Returns
    -------
    CalibrationArtifacts
        The artifacts, to be saved and shared by all files of the model.

    Raises
    ------
    InputError
        When there are no dumps, or too few tokens to learn from.
    MismatchError
        For dumps of different models.
    """
    name, method_class = _method_of(config)
    method = method_class()
    samples = Samples(files, config.sinks, config.samples_per_file, progress)
    streams = method.train(samples, config)
    meta = {
        "method": name,
        "mlxkv": __version__,
        "model": samples.origin.model,
        "model_fingerprint": samples.origin.fingerprint,
        **config.to_dict(),
        **method.facts(streams),
        **samples.facts,
        "calibration_tokens": samples.tokens,
        "calibration_files": len(files),
    }
    return CalibrationArtifacts(streams["k"], streams["v"], samples.spec, meta)


def codec_config(preset: str) -> CodecConfig:
    """Return the settings of the codec method that a preset names.

    Parameters
    ----------
    preset
        Name of a method preset, such as "kvtc-16".

    Returns
    -------
    CodecConfig
        The settings.

    Raises
    ------
    PresetError
        For an unknown preset, and for a preset of a live method.

    Examples
    --------
    >>> codec_config("kvtc-16").compression_ratio
    16.0
    """
    if preset not in preset_names("methods"):
        raise PresetError(f"no preset {preset[:80]!r} of a codec", suggest(preset, presets_of(codec_methods.names())))
    named = method_preset(preset)
    if (method := codec_methods.find(named.method)) is None:
        raise PresetError(f"{preset!r} is of the live method {named.method}: it takes no calibration; use --cache")
    return named.config(method.config_class)


def _method_of(config: CodecConfig) -> tuple[str, type[CodecMethod]]:
    """Return the name and class of the method that these settings belong to."""
    for name, method in codec_methods.items():
        if method.config_class is type(config):
            return name, method
    raise InputError(f"{config!r} are no settings of a codec method: those are {', '.join(codec_methods.names())}")

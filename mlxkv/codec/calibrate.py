"""Calibration: learn a method's artifacts from cache dumps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv.codec.artifacts import CalibrationArtifacts, group_facts
from mlxkv.codec.methods.base import BlockCoder, CodecConfig, CodecMethod, StreamArtifacts, codec_methods
from mlxkv.codec.reading import check_origin, header_object
from mlxkv.codec.samples import Progress, Samples
from mlxkv.dump import stream_key
from mlxkv.errors import FormatError, InputError, PresetError, suggest
from mlxkv.io.container import Reader
from mlxkv.presets import method_preset, preset_names, presets_of
from mlxkv.spec import CacheSpec
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
        The artifacts, to be saved and shared by all files of the model. Their `meta` has what `measure_errors` found, of other
        groups of layers under "groups", and `calibration_warning` says of it whether tokens were too few.

    Raises
    ------
    InputError
        When there are no dumps, or too few tokens to learn from.
    MismatchError
        For dumps of different models.
    """
    return learn(method_to_calibrate(config)(), Samples(files, config.sinks, config.samples_per_file, progress), config)


def method_to_calibrate(config: CodecConfig) -> type[CodecMethod]:
    """Return the method that settings belong to, before any work for it.

    Parameters
    ----------
    config
        Settings of a codec method.

    Returns
    -------
    type[CodecMethod]
        Its class.

    Raises
    ------
    InputError
        When it needs no calibration, or these are no settings of a codec method.
    """
    name, method = _method_of(config)
    if not method.needs_calibration:
        raise InputError(f"{name} needs no calibration", "mlxkv compress uses it where there are no artifacts")
    return method


def uncalibrated(
    spec: CacheSpec, *, model: str = "", fingerprint: str = "", method: str = "direct"
) -> CalibrationArtifacts:
    """Make the artifacts of a method that needs no calibration: they follow from the description of the cache.

    Parameters
    ----------
    spec
        Description of the model's cache.
    model
        Name that the model is loaded by.
    fingerprint
        `mlxkv.identity.fingerprint` of its weights; dumps of other models are refused.
    method
        "direct", "exact" or another method without calibration.

    Returns
    -------
    CalibrationArtifacts
        Artifacts with a fingerprint that depends on the method and the description alone. They need not be kept: files say
        how to make them again, and `read_uncalibrated` does.

    Raises
    ------
    InputError
        For an unknown method, and for one that is calibrated.
    """
    found = codec_methods.get(method)()
    parts: dict[str, StreamArtifacts] = {}
    for index, group in enumerate(spec.groups):
        parts |= {stream_key(index, name): part for name, part in found.without_calibration(group).items()}
    meta = {"method": method, "mlxkv": __version__, "model": model, "model_fingerprint": fingerprint}
    return CalibrationArtifacts(parts.pop("k"), parts.pop("v"), spec, meta, parts)


def read_uncalibrated(reader: Reader) -> CalibrationArtifacts | None:
    """Make the artifacts of a file again that was written without calibration.

    Parameters
    ----------
    reader
        The open container, from any source.

    Returns
    -------
    CalibrationArtifacts
        Those that the file names, for the model that it names; None where it was written with a calibration.

    Raises
    ------
    FormatError
        When the header describes other artifacts than it names, or does not describe any.
    """
    recipe = reader.header.get("uncalibrated")
    if recipe is None:
        return None
    meta = header_object(reader, "meta")
    if not isinstance(recipe, dict) or set(recipe) != {"spec"} or not isinstance(recipe["spec"], dict):
        raise FormatError(f"{reader.name} has a header that does not describe its cache: {str(recipe)[:80]}")
    method = codec_methods.find(reader.header.get("method"))
    if method is None or method.needs_calibration:
        raise FormatError(
            f"{reader.name} is of method {str(reader.header.get('method'))[:80]!r}, which this mlxkv does not have"
        )
    artifacts = uncalibrated(
        CacheSpec.from_json(recipe["spec"]),
        model=str(meta.get("model", "")),
        fingerprint=str(meta.get("fingerprint", "")),
        method=reader.header["method"],
    )
    check_origin(reader, artifacts)
    return artifacts


def learn(method: CodecMethod, samples: Samples, config: CodecConfig) -> CalibrationArtifacts:
    """Learn the artifacts of a codec method from training data.

    Parameters
    ----------
    method
        The method that these settings belong to, or a variant of it that makes the same artifacts.
    samples
        The data of the main group of layers.
    config
        Settings.

    Returns
    -------
    CalibrationArtifacts
        The artifacts of all groups, as `calibrate` returns them.

    Raises
    ------
    InputError
        When there are too few tokens to learn from.
    MismatchError
        For dumps of different models.
    """
    streams, facts = _train(method, samples, config)
    others: dict[str, StreamArtifacts] = {}
    other_facts = []
    for group in range(1, len(samples.spec.groups)):
        parts, found = _train(method, samples.of_group(group), config)
        others |= {stream_key(group, part): artifacts for part, artifacts in parts.items()}
        other_facts.append(found)
    meta = {
        "method": _method_of(config)[0],
        "mlxkv": __version__,
        "model": samples.origin.model,
        "model_fingerprint": samples.origin.fingerprint,
        **config.to_dict(),
        **facts,
        "calibration_files": len(samples.files),
        **({"groups": other_facts} if other_facts else {}),
    }
    return CalibrationArtifacts(streams["k"], streams["v"], samples.spec, meta, others)


def _train(
    method: CodecMethod, samples: Samples, config: CodecConfig
) -> tuple[Mapping[str, StreamArtifacts], dict[str, Any]]:
    """Learn the artifacts of one group of layers; return them with their facts."""
    streams = method.train(samples, config)
    return streams, {
        **method.facts(streams),
        **samples.facts,
        **measure_errors(method.coder(streams), samples),
        "calibration_tokens_needed": method.tokens_needed(streams, config),
        "calibration_tokens": samples.tokens,
    }


def measure_errors(coder: BlockCoder, samples: Samples) -> dict[str, Any]:
    """Code held-out tokens at the method's default quality, and as many that were trained on.

    Parameters
    ----------
    coder
        A coder with the artifacts that were learnt.
    samples
        What they were learnt from.

    Returns
    -------
    dict
        `held_out_error` and `trained_error`, by stream: squared errors relative to squared values. An error of held-out
        tokens far above that of trained ones tells of too few texts. Empty where there are too few tokens to hold any out.
    """
    found = {}
    for label, parts in (("held_out_error", samples.held_out), ("trained_error", samples.trained)):
        rows = {name: mx.array(x) for name, x in parts.items() if x.size}
        if rows:
            count = len(next(iter(rows.values())))
            back = coder.decode(coder.encode(rows, coder.default_quality), count, coder.default_quality)
            found[label] = {name: _relative_error(x, back[name]) for name, x in rows.items()}
    return found


def _relative_error(rows: mx.array, back: mx.array) -> float:
    """Return the squared error over the squared rows, rounded for reading."""
    error, energy = (float(np.square(np.array(x), dtype=np.float64).sum()) for x in (rows - back, rows))
    return float(f"{error / max(energy, 1e-300):.3g}")


def calibration_warning(meta: Mapping[str, Any]) -> str | None:
    """Say whether artifacts were learnt from too few tokens.

    Parameters
    ----------
    meta
        The artifacts' `meta`.

    Returns
    -------
    str or None
        The number of tokens found and needed, for the group of layers that lacks most; None where there are enough, and for
        artifacts that do not tell.

    Examples
    --------
    >>> calibration_warning({"calibration_tokens": 992, "calibration_tokens_needed": 5760})[:57]
    '992 tokens are few to learn 5,760 directions from: dump m'
    """
    groups = meta.get("groups")
    others = range(1, len(groups) + 1) if isinstance(groups, list) else ()
    few: list[tuple[int, int]] = []
    for facts in (meta, *(group_facts(meta, group) for group in others)):
        found, needed = facts.get("calibration_tokens"), facts.get("calibration_tokens_needed")
        if isinstance(found, int) and isinstance(needed, int) and found < needed:
            few.append((found, needed))
    if not few:
        return None
    found, needed = max(few, key=lambda count: count[1] / max(1, count[0]))
    return (
        f"{found:,} tokens are few to learn {needed:,} directions from: dump more or longer texts, at least {needed:,} tokens in"
        " all, or files become larger and predictions from them less exact"
    )


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

"""Calibration of the `kvtc` method: cache dumps in, a mean, a basis and a bit plan for each stream out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import mlxkv
from mlxkv.cache import STREAMS, CacheSpec, KVDump, Stream
from mlxkv.codec.artifacts import CalibrationArtifacts, StreamArtifacts
from mlxkv.codec.kvtc import Settings
from mlxkv.codec.layout import BLOCK
from mlxkv.codec.pca import principal_components
from mlxkv.codec.plan import CODED, SIZES, Plan, allocate
from mlxkv.codec.quantize import coded
from mlxkv.codec.rows import to_rows
from mlxkv.errors import InputError, MismatchError
from mlxkv.files import read_dump

MAX_ERROR_TOKENS = 512  # tokens that group errors are measured on
Progress = Callable[[str], None]


class Origin(NamedTuple):
    """What a dump was made by, without its arrays."""

    model: str
    fingerprint: str
    spec: CacheSpec


def calibrate(
    files: Sequence[str | Path], settings: Settings, progress: Progress = lambda step: None
) -> CalibrationArtifacts:
    """Artifacts of the `kvtc` method from dumps of one model. `progress` is told each step as it starts.

    Raises InputError when too little is left to calibrate on and MismatchError for dumps of different models.
    """
    if not files:
        raise InputError("calibration needs at least one dump; make them with mlxkv dump")
    first = _origin(read_dump(files[0]))
    parts, tokens = [], 0
    for name in STREAMS:
        # One stream at a time, reading the files twice: memory holds one stream's samples and one dump.
        rows = np.concatenate([_sample(path, first, name, settings, progress) for path in files])
        tokens = len(rows)
        if tokens < 2:
            raise InputError(f"{tokens} tokens are left after the first {settings.s} of each file: dump longer texts")
        parts.append(_calibrate_stream(first.spec.stream(name), rows, settings, progress))
    meta = {
        "method": "kvtc",
        "mlxkv": mlxkv.__version__,
        "model": first.model,
        "model_fingerprint": first.fingerprint,
        **dataclasses.asdict(settings),
        "plan_rank": {name: part.plan.rank for name, part in zip(STREAMS, parts)},
        "calibration_tokens": tokens,
        "calibration_files": len(files),
    }
    return CalibrationArtifacts(parts[0], parts[1], first.spec, meta)


def group_errors(coefficients: np.ndarray) -> dict[tuple[int, str], np.ndarray]:
    """Mean squared error a token of coding each group, by (size, kind): `[r - size + 1]`, indexed by first component.

    Measured by quantizing windows of coefficients `[n, r]`. Neighbouring windows overlap almost wholly, so sizes
    above 16 are measured at every size/16-th start and interpolated between.
    """
    tokens, rank = coefficients.shape
    table = {}
    for size in (size for size in SIZES if size <= rank):
        starts = np.unique(np.r_[0 : rank - size + 1 : max(1, size // 16), rank - size])
        windows = np.lib.stride_tricks.sliding_window_view(coefficients, size, axis=1).transpose(1, 2, 0)
        step = max(1, 2**23 // (tokens * size))
        batches = [mx.array(windows[starts[a : a + step]]) for a in range(0, len(starts), step)]
        for kind in CODED:
            errors = np.concatenate([_mean_error(batch, kind) for batch in batches])
            table[size, kind] = np.interp(np.arange(rank - size + 1), starts, errors)
    return table


def _mean_error(windows: mx.array, kind: str) -> np.ndarray:
    difference = coded(windows, kind) - windows
    return np.array(mx.square(difference).sum(axis=1).mean(axis=1), dtype=np.float64)


def _calibrate_stream(stream: Stream, rows: np.ndarray, settings: Settings, progress: Progress) -> StreamArtifacts:
    if stream.width == 0:
        return StreamArtifacts(np.zeros(0, np.float32), np.zeros((0, 0), np.float16), Plan())
    budget, rank = settings.budget(stream.width), settings.components(stream.width)
    if not np.isfinite(rows).all():
        raise InputError(f"the dumps hold NaN or infinite values in {stream.name}")
    progress(f"principal components of {stream.name}: {rows.shape[0]} tokens x {rows.shape[1]}")
    mean, basis = principal_components(rows, rank, settings.seed)
    progress(f"bit plan of {stream.name}: {budget} bits a token")
    coefficients = rows @ basis
    spread = coefficients[:: -(-len(coefficients) // MAX_ERROR_TOKENS)]
    energy = np.square(coefficients, dtype=np.float64).mean(axis=0)
    plan = allocate(energy, group_errors(spread), budget)
    if not plan.groups:
        raise InputError(
            f"{budget} bits a token cannot code a single component of {stream.name}; lower the compression ratio"
        )
    return StreamArtifacts(mean, basis[:, : plan.rank].astype(np.float16), plan)


def _sample(path: str | Path, first: Origin, name: str, settings: Settings, progress: Progress) -> np.ndarray:
    """Un-rotated rows `[tokens, p]` of one file, made block by block so that only the chosen ones stay."""
    progress(f"reading {name} of {Path(path).name}")
    dump = read_dump(path)
    origin = _origin(dump)
    if (origin.spec, origin.fingerprint) != (first.spec, first.fingerprint):
        raise MismatchError(
            f"{path} was dumped from {origin.model} ({origin.fingerprint}),"
            f" the first file from {first.model} ({first.fingerprint})"
        )
    stream, batch = dump.spec.stream(name), dump.tokens.shape[0]
    count = batch * max(0, dump.length - settings.s)
    limit = min(count, settings.samples_per_file or count)
    chosen = np.zeros(count, dtype=bool)
    chosen[np.linspace(0, count - 1, limit).astype(int)] = True
    chosen = chosen.reshape(batch, -1)
    kept = [np.zeros((0, stream.width), np.float32)]
    for start in range(settings.s, dump.length, BLOCK):
        stop = min(start + BLOCK, dump.length)
        rows = np.array(to_rows(stream, list(dump.stream(name)), start, stop))
        kept.append(rows[chosen[:, start - settings.s : stop - settings.s].reshape(-1)])
    return np.concatenate(kept)


def _origin(dump: KVDump) -> Origin:
    return Origin(dump.model, dump.fingerprint, dump.spec)

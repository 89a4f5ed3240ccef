"""Compressed caches, parts of a text, artifacts and journals of appends, damaged and forged with right checksums."""

import contextlib
import json
import shutil
from dataclasses import replace
from functools import cache

import mlx.core as mx
import numpy as np
from forging import forge, header_of
from synthetic import (
    DUAL,
    GROUPED,
    LATENT,
    PLAIN,
    grouped_artifacts,
    grouped_dump,
    rd_artifacts,
    toy_artifacts,
    toy_dump,
    toy_sensitivity,
)

from fuzz.examples import by_kind, inspect, room
from fuzz.mutations import edit_array, edit_bytes, edit_json
from mlxkv.codec import artifacts as artifact_files
from mlxkv.codec import writing
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate, read_uncalibrated, uncalibrated
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.methods.kvtc_weighted import KVTCWeightedConfig
from mlxkv.codec.parts import CachePart, PartCodec, StoredPart, check_part, decode_parts, read_positions
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import stream_key, write_dump
from mlxkv.errors import MlxkvError
from mlxkv.io import growing, lossless
from mlxkv.io.container import Reader, digest
from mlxkv.spec import STREAMS, CacheSpec

LENGTH, LONGER = 30, 40
CODECS = ("kvtc", "kvtc rans", "kvtc-weighted", "kvtc-rd", "kvtc-rd mla", "kvtc groups", "kvtc-rd groups", "direct",
          "direct mla", "exact groups")  # fmt: skip
# Full layers beside a window that the files' 30 tokens have moved on.
WINDOWED = CacheSpec("toy", tuple(x and replace(x, window=x.window and 12) for x in GROUPED["window"].layers))


@cache
def codec(variant):
    method, folder = variant.partition(" ")[0], room()[1] / variant
    folder.mkdir()
    spec = DUAL if method == "kvtc" else LATENT if variant.endswith("mla") else PLAIN
    if method in ("direct", "exact"):
        of_spec = WINDOWED if variant.endswith("groups") else spec
        made = uncalibrated(of_spec, fingerprint="f00d.cafe", method=method)
    elif variant.endswith("groups"):
        config = KVTCConfig(4.0) if method == "kvtc" else KVTCRDConfig()
        made = grouped_artifacts(folder, WINDOWED, config, seeds=(0,))
    elif method == "kvtc":
        made = toy_artifacts(folder, spec, seeds=(0,))
    elif method == "kvtc-rd":
        made = rd_artifacts(folder, spec, seeds=(0,))
    else:
        dump = toy_dump(spec)
        write_dump(folder / "a.npz", replace(dump, sensitivity=toy_sensitivity(dump)))
        made = calibrate([folder / "a.npz"], KVTCWeightedConfig(4))
    made.save(folder / "artifacts")
    return CacheCodec(made, recent=5, sinks=2, lossless="rans" if "rans" in variant else "deflate")


@contextlib.contextmanager
def small_blocks():
    """Writers make blocks of 8 rows, so that small files have several."""
    before, writing.BLOCK_ROWS = writing.BLOCK_ROWS, 8
    try:
        yield
    finally:
        writing.BLOCK_ROWS = before


@cache
def dump_of(variant, length):
    if variant.endswith("groups"):
        return grouped_dump(WINDOWED, length, states=True, of=LONGER)
    dump = toy_dump(codec(variant).artifacts.spec, length=LONGER, states=True)
    return replace(dump, k=dump.k[..., :length, :], v=dump.v[..., :length, :], tokens=dump.tokens[:, :length])


@cache
def codec_file(variant):
    short = dump_of(variant, LENGTH)
    with small_blocks():
        blob = codec(variant).compress_dump(short)
    return blob, codec(variant).decompress_dump(blob)


def sections_of(blob):
    header, body = header_of(blob)
    parts, position = [], 0
    for row in header["sections"]:
        parts.append(body[position : position + row[3]])
        position += row[3]
    return header, parts


def signed(header, parts):
    """A container of these sections, whose table says what is there."""
    for row, part in zip(header["sections"], parts):
        row[3:] = [len(part), digest(part).hex()]
        if row[1] == "raw":
            row[2] = len(part)
    return forge(header, b"".join(parts))


def damaged_container(blob, recipe):
    """Sections edited as they are stored or before they are coded; then the header, with right checksums in any case."""
    header, parts = sections_of(blob)
    for part, edit in by_kind(recipe, "bytes"):
        row = header["sections"][part % len(parts)]
        place = part % len(parts)
        if edit["value"] % 2:
            parts[place] = edit_bytes(parts[place], edit)
        else:
            plain = edit_bytes(lossless.decode(row[1], parts[place], row[2]), edit)
            parts[place], row[2] = lossless.encode(row[1], plain), len(plain)
    signed_blob = signed(header, parts)
    header, body = header_of(signed_blob)
    for _, edit in by_kind(recipe, "json"):
        header = edit_json(header, edit)
    return forge(header, body)


def container(recipe, folder):
    """Compressed caches with right checksums."""
    variant, path = recipe["variant"], folder / "a.mlxkv"
    path.write_bytes(damaged_container(codec_file(variant)[0], recipe))
    read_compressed(variant, codec(variant), path)


@cache
def part_file(variant):
    """A part in the middle of a text, and its artifacts; layers with a window have lost its first rows."""
    dump, made = dump_of(variant, LENGTH), codec(variant).artifacts
    streams, firsts = {}, {}
    for index in range(len(made.spec.groups)):
        for name in STREAMS:
            array = dump.stream(name, index)
            firsts[index] = max(10, LENGTH - array.shape[3])
            streams[stream_key(index, name)] = [layer[:1, :, firsts[index] - LENGTH :] for layer in array]
    tokens = np.ascontiguousarray(dump.tokens[0, 10:])
    part = CachePart(10, LENGTH, tokens, streams, firsts, dump.dtype)
    return PartCodec(made, recent=5).encode(part, {"fingerprint": "f00d.cafe"}), made


def part(recipe, folder):
    """Parts of a text with right checksums."""
    blob, made = part_file(recipe["variant"])
    path = folder / "a.mlxkv"
    path.write_bytes(damaged_container(blob, recipe))
    inspect(path)
    with Reader(path) as opened:
        with contextlib.suppress(MlxkvError):
            check_part(opened, made.spec)
        with contextlib.suppress(MlxkvError):
            read_uncalibrated(opened)
        for piece in decode_parts([StoredPart(opened, made)], read_positions(opened)[1], "float16"):
            mx.eval(piece.array)


def read_compressed(variant, reader, path):
    inspect(path)
    results = []
    with contextlib.suppress(MlxkvError), Reader(path) as opened:
        if (made := read_uncalibrated(opened)) is not None:
            CacheCodec(made).decompress_dump(path)
    for call in (
        lambda: reader.decompress_dump(path),
        lambda: reader.decompress(path, tokens=(1, 9)),
        lambda: append(reader, path, dump_of(variant, LONGER)),
    ):
        try:
            results.append(call())
        except MlxkvError as error:
            results.append(error)
    if isinstance(results[0], MlxkvError):
        raise results[0]


def append(reader, path, dump):
    with small_blocks():
        reader.append_dump(path, dump)
    reader.decompress_dump(path)


def damage(recipe, folder):
    """Compressed caches whose bytes have changed under their checksums: refused, or read as what was written."""
    variant, path = recipe["variant"], folder / "a.mlxkv"
    blob, expected = codec_file(variant)
    for _, edit in by_kind(recipe, "bytes"):
        blob = edit_bytes(blob, edit)
    path.write_bytes(blob)
    inspect(path)
    found = codec(variant).decompress_dump(path)
    assert same(found, expected), "silently other values"


def same(found, expected):
    pairs = [(found.k, expected.k), (found.v, expected.v), (found.tokens, expected.tokens)]
    pairs += [(found.states[key], expected.states[key]) for key in expected.states]
    pairs += [(found.others[key], expected.others[key]) for key in expected.others]
    return found.rings == expected.rings and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs
    )


# Artifacts


def artifacts(recipe, folder):
    """Calibration artifacts with right checksums and, where anything can be made of them, the right fingerprint."""
    variant = recipe["variant"]
    target = folder / "artifacts"
    codec(variant)
    shutil.copytree(room()[1] / variant / "artifacts", target)
    meta = json.loads((target / "meta.json").read_text())
    arrays, plans = sorted(target.glob("*.npy")), sorted(target.glob("*_plan.json"))
    for part, edit in by_kind(recipe, "array"):
        path = arrays[part % len(arrays)]
        with contextlib.suppress(Exception):  # one that was made unreadable before
            path.write_bytes(edit_array(np.load(path), edit))
    for part, edit in by_kind(recipe, "bytes"):
        path = arrays[part % len(arrays)]
        path.write_bytes(edit_bytes(path.read_bytes(), edit))
    for part, edit in by_kind(recipe, "json"):
        if plans and part % 3 == 0:
            path = plans[part // 3 % len(plans)]
            path.write_text(json.dumps(edit_json(json.loads(path.read_text()), edit)))
        else:
            meta = edit_json(meta, edit)
    if isinstance(meta.get("checksums"), dict):
        meta["checksums"] |= {path.name: digest(path.read_bytes()).hex() for path in (*arrays, *plans)}
    with contextlib.suppress(MlxkvError):
        meta["fingerprint"] = fingerprint_of(target, meta)
    (target / "meta.json").write_text(json.dumps(meta))
    inspect(target)
    found = CalibrationArtifacts.from_dir(target)
    header, body = header_of(codec_file(variant)[0])
    path = folder / "a.mlxkv"
    path.write_bytes(forge({**header, "artifacts": found.fingerprint, "method": found.method_name}, body))
    read_compressed(variant, CacheCodec(found, recent=5, sinks=2), path)


def fingerprint_of(target, meta):
    """The fingerprint that artifacts have whatever is in them, as an attacker would make it."""
    method = artifact_files._method(meta, str(target)).artifacts_class
    checksums = meta.get("checksums")
    known = checksums if isinstance(checksums, dict) else {}
    spec = CacheSpec.from_json(meta.get("spec", {}))
    names = [stream_key(group, name) for group in range(len(spec.groups)) for name in "kv"]
    parts = {name: artifact_files._read_stream(method, target, name, known) for name in names}
    return CalibrationArtifacts(parts.pop("k"), parts.pop("v"), spec, meta, parts).fingerprint


# Journals


@cache
def interrupted():
    """A file, and the journal of an append that was interrupted before the file itself was written."""
    path, kept = room()[1] / "j.mlxkv", growing._apply
    path.write_bytes(codec_file("kvtc")[0])
    growing._apply = lambda *_: False
    try:
        with small_blocks():
            codec("kvtc").append_dump(path, dump_of("kvtc", LONGER))
    finally:
        growing._apply = kept
    return path.read_bytes(), path.with_name(".j.mlxkv.rest").read_bytes(), codec("kvtc").decompress_dump(path)


def journal(recipe, folder):
    """Journals of appends whose bytes have changed: the old file, the new one, or an error."""
    blob, rest, new = interrupted()
    for _, edit in by_kind(recipe, "bytes"):
        rest = edit_bytes(rest, edit)
    path = folder / "j.mlxkv"
    path.write_bytes(blob)
    path.with_name(".j.mlxkv.rest").write_bytes(rest)
    inspect(path)
    found = codec("kvtc").decompress_dump(path)
    assert same(found, new) or same(found, codec_file("kvtc")[1]), "silently other values"
    append(codec("kvtc"), path, dump_of("kvtc", LONGER))
    assert same(codec("kvtc").decompress_dump(path), new), "silently other values"

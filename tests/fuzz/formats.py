"""Every format that mlxkv reads: how a recipe damages an intact example, with right checksums, and how it is then read."""

import contextlib
import io
import json
import zipfile
from dataclasses import replace
from functools import cache, partial

import mlx.core as mx
import numpy as np
from conftest import tiny_model, tiny_tokens
from synthetic import (
    DUAL,
    toy_sensitivity,
)

from fuzz import codec_formats, prompt_format
from fuzz.codec_formats import CODECS, damaged_container
from fuzz.examples import by_kind, fresh, inspect, room
from fuzz.mutations import edit_array, edit_bytes, edit_json, toml_of
from mlxkv import lm, presets
from mlxkv.dump import read_dump, write_dump
from mlxkv.evaluate.journal import Journal
from mlxkv.live.base import live_methods
from mlxkv.live.seam import make_cache
from mlxkv.live.serialization import load_cache, save_cache

LIVE = {"int8": {}, "int4": {}, "kivi": {}, "full": {}, "h2o": {"heavy": 8, "recent": 8}}
LIVE |= {"sliding-window": {"recent": 16}, "streaming-llm": {"recent": 16}, "random": {"tokens": 16, "recent": 4}}
LIVE |= {"smartkv": {}, "sketch-topk": {"heavy": 8, "recent": 8}, "sketch-aggregate": {"heavy": 8, "recent": 8}}
LIVE |= {"mp-kvm": {"centroids": 8, "recent": 8, "flush": 4}}


# Dumps


@cache
def model(name):
    if name == "windows":
        return tiny_model("llama", layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    return tiny_model(name)


@cache
def dump_file(name):
    path = room()[1] / f"{name}.npz"
    taken = lm.dump(model(name), tiny_tokens(12), name=name)
    write_dump(path, taken if taken.others else replace(taken, sensitivity=toy_sensitivity(taken)))
    return path


def npz(recipe, folder):
    """Dumps whose members or bytes have changed; the zip's own checksums are right but for changed bytes."""
    name, path = recipe["variant"], folder / "a.npz"
    with zipfile.ZipFile(dump_file(name)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    names = list(members)
    for part, edit in by_kind(recipe, "array"):
        chosen = names[part % len(names)]
        with contextlib.suppress(Exception):
            members[chosen] = edit_array(np.load(io.BytesIO(members[chosen])), edit)
    for _, edit in by_kind(recipe, "json"):
        with contextlib.suppress(Exception):
            meta = edit_json(json.loads(str(np.load(io.BytesIO(members["meta.npy"])))), edit)
            file = io.BytesIO()
            np.save(file, np.array(json.dumps(meta)))
            members["meta.npy"] = file.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    for _, edit in by_kind(recipe, "bytes"):
        path.write_bytes(edit_bytes(path.read_bytes(), edit))
    inspect(path)
    dump = read_dump(path)
    caches = lm.restore(model(name), dump)
    go_on(model(name), caches)


def go_on(loaded, caches):
    """Two tokens."""
    for token in (3, 5):
        mx.eval(loaded(mx.array([[token]]), cache=caches))


# Live caches


@cache
def live_file(variant):
    method, _, architecture = variant.partition(" ")
    loaded = model(architecture or "llama")
    path = room()[1] / f"{variant}.cache"
    config = live_methods.get(method).config_class(**LIVE[method])
    caches = make_cache(loaded, config)
    for chunk in (tiny_tokens(40), tiny_tokens(90), [7]):
        mx.eval(loaded(mx.array([chunk]), cache=caches))
    save_cache(path, loaded, caches)
    return path.read_bytes()


def live(recipe, folder):
    """Saved live caches with right checksums."""
    variant, path = recipe["variant"], folder / "a.cache"
    loaded = model(variant.partition(" ")[2] or "llama")
    path.write_bytes(damaged_container(live_file(variant), recipe))
    inspect(path)
    go_on(loaded, load_cache(path, loaded))


# Journals of evaluations


@cache
def eval_lines():
    rows = [{"model": "m", "seeds": 1}]
    rows += [{"sample": f"s {i}", "records": [{"variant": "full", "kl": 0.1 * i}]} for i in range(4)]
    return rows


def eval_journal(recipe, folder):
    """Journals of evaluations."""
    rows, path = eval_lines(), folder / "a.json.partial"
    for part, edit in by_kind(recipe, "json"):
        place = part % len(rows)
        rows = [*rows[:place], edit_json([rows[place]], edit), *rows[place + 1 :]]
        rows[place] = rows[place][0] if rows[place] else {}
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for _, edit in by_kind(recipe, "bytes"):
        data = edit_bytes(data, edit)
    path.write_bytes(data)
    with Journal(path, {"model": "m"}) as opened:
        opened.begin({"seeds": 1})
        opened.add("another", [{"variant": "full"}])


# Presets


@cache
def preset_texts():
    """Presets of methods and models as JSON trees, by kind and name."""
    import tomllib

    found = {}
    for path in sorted(presets.resource_dir("presets").glob("*/*.toml")):
        found[path.parent.name, path.stem] = tomllib.loads(path.read_text())
    return found


def preset(recipe, folder):
    """Presets with other values, and broken TOML."""
    kinds = sorted(preset_texts())
    kind, name = kinds[recipe["edits"][0]["part"] % len(kinds)]
    tree = preset_texts()[kind, name]
    for _, edit in by_kind(recipe, "json"):
        tree = edit_json(tree, edit)
    text = "\n".join(f"{json.dumps(str(key))} = {toml_of(value)}" for key, value in tree.items()).encode(
        "utf-8", "replace"
    )
    for _, edit in by_kind(recipe, "bytes"):
        text = edit_bytes(text, edit)
    for each in ("models", "methods"):
        (folder / "presets" / each).mkdir(parents=True)
    (folder / "presets" / kind / f"{name}.toml").write_bytes(text)
    before, presets.resource_dir = presets.resource_dir, lambda _: folder / "presets"
    try:
        if kind == "models":
            presets.model_preset(name).check(DUAL)
            return
        found = presets.method_preset(name)
        method = live_methods.find(found.method)
        if method is not None:
            config = found.config(method.config_class)
            go_on(model("llama"), make_cache(model("llama"), config))
    finally:
        presets.resource_dir = before


FORMATS = {
    "container": (codec_formats.container, CODECS, {}),
    "damage": (codec_formats.damage, CODECS, {"json": False}),
    "part": (codec_formats.part, CODECS, {}),
    "artifacts": (codec_formats.artifacts, CODECS, {"arrays": True}),
    "npz": (npz, ("llama", "lfm2", "windows"), {"arrays": True}),
    "live": (live, (*LIVE, "int8 lfm2", "kivi glm4_moe_lite", "mp-kvm glm4_moe_lite", "int4 windows"), {}),
    "prompt": (partial(prompt_format.read, inspect=inspect), prompt_format.VARIANTS, {}),
    "journal": (codec_formats.journal, ("kvtc",), {"json": False}),
    "eval journal": (eval_journal, ("eval",), {}),
    "preset": (preset, ("toml",), {}),
}


def read(recipe, folder):
    """Make what the recipe says, in the folder, and read it; raises what the reader raises."""
    FORMATS[recipe["format"]][0](recipe, fresh(folder))

"""Saved live caches that were changed with fitting checksums: what a method could not have written is refused while loading."""

import copy
import sys
from itertools import count, islice

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from forging import forge, header_of
from live_checks import METHODS, small

from mlxkv.errors import FormatError, MlxkvError
from mlxkv.io.container import digest
from mlxkv.live import serialization
from mlxkv.live.seam import assemble_cache, make_cache
from mlxkv.live.serialization import load_cache, save_cache

LENGTH = 150
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "uint32": 4, "int8": 1, "uint8": 1}


def saved(method, path, architecture="llama", **overrides):
    model = tiny_model(architecture)
    caches = make_cache(model, method, **{**small(method), **overrides})
    mx.eval(model(mx.array([tiny_tokens(LENGTH)]), cache=caches))
    save_cache(path, model, caches)
    return model


def forged(path, change):
    """Rewrite the header with fitting checksums, as an attacker would."""
    header, body = header_of(path.read_bytes())
    change(header)
    path.write_bytes(forge(header, body))


class File:
    """A saved cache in parts: its header, and its arrays by index."""

    def __init__(self, blob):
        self.header, body = header_of(blob)
        ends = np.cumsum([row[3] for row in self.header["sections"]])
        self.datas = [body[end - row[3] : end] for end, row in zip(ends, self.header["sections"])]

    def field(self, name, layer=0):
        """The description of a field of a layer's state."""
        return dict(self.header["layers"][layer][2]["dict"])[name]

    def set_field(self, name, value):
        state = self.header["layers"][0][2]["dict"]
        state[[key for key, _ in state].index(name)][1] = value

    def change_array(self, description, change, kind=None):
        """Replace an array's values by a function of them; bfloat16 and float16 are seen as their bits."""
        index = description["array"]
        row = self.header["arrays"][index]
        seen = {"float32": "f4", "int32": "i4", "uint32": "u4"}.get(row[0], f"u{SIZES[row[0]]}")
        array = change(np.frombuffer(self.datas[index], seen).reshape(row[1]).copy())
        self.header["arrays"][index] = [kind or row[0], list(array.shape)]
        self.datas[index] = array.tobytes()

    def seal(self):
        for row, data in zip(self.header["sections"], self.datas):
            row[2:] = [len(data), len(data), digest(data).hex()]
        return forge(self.header, b"".join(self.datas))


HEADERS = {
    "kind": lambda h: h.update(kind="something"),
    "no methods": lambda h: h.pop("methods"),
    "methods": lambda h: h.update(methods=3),
    "a method without settings": lambda h: h["methods"][0].pop(),
    "settings": lambda h: h["methods"][0].__setitem__(1, 3),
    "unknown settings": lambda h: h["methods"][0].__setitem__(1, {"bits": 4}),
    "a method that is not there": lambda h: h["layers"][0].__setitem__(0, 1),
    "a method of its own": lambda h: h["layers"][0].__setitem__(0, True),
    "mlx-lm's class": lambda h: h["layers"][0].__setitem__(0, "KVCache"),
    "fewer layers": lambda h: h["layers"].pop(),
    "more layers": lambda h: h["layers"].append(h["layers"][0]),
    "layers": lambda h: h.update(layers={}),
    "a shorter layer": lambda h: h["layers"][0].pop(),
    "fewer arrays": lambda h: h["arrays"].pop(),
    "an array that no layer has": lambda h: h["layers"][0].__setitem__(2, h["layers"][1][2]),
    "a shared array": lambda h: h["layers"][0][2]["dict"][1].__setitem__(1, {"tuple": [{"array": 0}, {"array": 0}]}),
    "offset": lambda h: h["layers"][0].__setitem__(1, -1),
    "an offset beyond int32": lambda h: h["layers"][0].__setitem__(1, 10**30),
    "an offset that is true": lambda h: h["layers"][0].__setitem__(1, True),
    "fewer tokens seen": lambda h: h["layers"][0].__setitem__(1, LENGTH - 1),
    "unequal layers": lambda h: h["layers"][0].__setitem__(1, LENGTH + 1),
    "no state": lambda h: h["layers"][0].__setitem__(2, None),
    "a part more": lambda h: h["layers"][0][2]["dict"].append(["other", None]),
    "a part twice": lambda h: h["layers"][0][2]["dict"].append(h["layers"][0][2]["dict"][1]),
    "a part without a name": lambda h: h["layers"][0][2]["dict"].append([["tail"], None]),
    "an unknown kind": lambda h: h["layers"][0].__setitem__(2, {"pickle": []}),
    "two kinds": lambda h: h["layers"][0].__setitem__(2, {"list": [], "tuple": []}),
    "a bare list": lambda h: h["layers"][0][2]["dict"][1].__setitem__(1, [1]),
    "type": lambda h: h["arrays"][0].__setitem__(0, "object"),
    "a type that is no text": lambda h: h["arrays"][0].__setitem__(0, ["float16"]),
    "shape": lambda h: h["arrays"][0].__setitem__(1, [1, 2, 3, 4]),
    "axes": lambda h: h["arrays"][0].__setitem__(1, [1] * 9),
    "negative": lambda h: h["arrays"][0].__setitem__(1, [-1, -2]),
    "beyond int32": lambda h: h["arrays"][0].__setitem__(1, [0, 2**40]),
    "coding": lambda h: h["sections"][0].__setitem__(1, "deflate"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_forged_header_is_a_typed_error(name, tmp_path):
    model = saved("int8", path := tmp_path / "cache")
    forged(path, lambda header: None)
    load_cache(path, model)
    forged(path, HEADERS[name])
    with pytest.raises(FormatError):
        load_cache(path, model)


def shorter(array):
    return array[:, :, :-1]


def one_head(array):
    return array[:, :1]


def first_part(name, index=0):
    """The `index`-th array of a field that is a tuple."""
    return lambda file: file.field(name)["tuple"][index]


def whole(name):
    return lambda file: file.field(name)


# Method and settings, then which array is changed how, then what the error names.
ARRAYS = [
    ("full", {}, whole("keys"), shorter, "values"),
    ("full", {}, whole("values"), lambda x: np.tile(x, (1, 1, 2, 1)), "values"),
    ("int8", {}, first_part("tail"), shorter, "tail"),
    ("int4", {}, first_part("tail", 1), one_head, "tail.values"),
    ("kivi", {}, first_part("tail"), lambda x: x[..., :-1], "tail.keys"),
    ("h2o", {}, first_part("tokens", 2), shorter, "tokens.attention"),
    ("h2o", {}, first_part("tokens", 2), one_head, "tokens.attention"),
    ("h2o", {}, first_part("tokens", 2), lambda x: x.astype("i4"), "tokens.attention"),
    ("smartkv", {}, whole("importance"), shorter, "importance"),
    ("smartkv", {}, whole("importance"), one_head, "importance"),
    ("mp-kvm", {}, first_part("centroids", 2), lambda x: x + 1000, "centroids.positions"),
    ("mp-kvm", {}, first_part("centroids", 2), one_head, "centroids.positions"),
    ("mp-kvm", {}, first_part("centroids", 3), lambda x: -x - 1, "centroids.counts"),
    ("mp-kvm", {}, first_part("centroids", 3), lambda x: x * 0 + np.nan, "centroids.counts"),
    ("mp-kvm", {}, first_part("centroids", 4), shorter, "centroids.attention"),
    ("mp-kvm", {}, first_part("tail", 2), shorter, "tail.attention"),
    ("sketch-topk", {}, whole("positions"), lambda x: x * 0, "positions"),
    ("sketch-topk", {}, whole("positions"), lambda x: x - 1, "positions"),
    ("sketch-topk", {}, whole("positions"), lambda x: x + LENGTH, "positions"),
    ("sketch-topk", {}, whole("positions"), shorter, "positions"),
    ("sketch-topk", {}, whole("counters"), lambda x: x[:, :, :-1], "counters"),
    ("sketch-topk", {"per": "layer"}, whole("counters"), lambda x: np.tile(x, (2, 1, 1)), "counters"),
    ("sketch-topk", {"target": 0.5}, whole("evicted_attention"), lambda x: x[:1], "evicted_attention"),
    ("sketch-topk", {"target": 0.5}, whole("coverage"), lambda x: x[None], "coverage"),
    ("sketch-aggregate", {}, first_part("merged", 2), lambda x: -x - 1, "merged.counts"),
    ("sketch-aggregate", {}, first_part("merged", 2), shorter, "merged.counts"),
    ("streaming-llm", {}, first_part("tokens"), shorter, "tokens"),
]


@pytest.mark.parametrize(("method", "settings", "where", "change", "named"), ARRAYS)
def test_an_array_that_the_method_cannot_have_is_refused_by_its_name(method, settings, where, change, named, tmp_path):
    model = saved(method, path := tmp_path / "cache", **settings)
    file = File(path.read_bytes())
    kind = "int32" if "astype" in change.__code__.co_names else None
    file.change_array(where(file), change, kind)
    path.write_bytes(file.seal())
    with pytest.raises(FormatError, match=f"layer 0: .*{named}"):
        load_cache(path, model)


FIELDS = [
    ("int8", "packed", 7),
    ("int8", "packed", {"list": []}),
    ("int8", "tail", None),
    ("int8", "tail", {"tuple": [1, 2]}),
    ("kivi", "tail", "much"),
    ("smartkv", "lower", None),
    ("smartkv", "lower", {"list": []}),
    ("smartkv", "importance", None),
    ("h2o", "tokens", {"tuple": []}),
    ("mp-kvm", "centroids", {"tuple": [5, "much", None, {"list": []}]}),
    ("sketch-topk", "size_factor", 1e300),
    ("sketch-topk", "size_factor", True),
    ("sketch-topk", "size_factor", float("nan")),
    ("sketch-topk", "coverage", 0.5),
    ("sketch-topk", "counters", None),
]


@pytest.mark.parametrize(("method", "field", "value"), FIELDS)
def test_a_field_of_another_kind_is_refused_by_its_name(method, field, value, tmp_path):
    model = saved(method, path := tmp_path / "cache")
    file = File(path.read_bytes())
    file.set_field(field, value)
    path.write_bytes(file.seal())
    with pytest.raises(FormatError, match=rf"layer 0: .*({field}|entries are stored)"):
        load_cache(path, model)


@pytest.mark.parametrize(
    ("method", "place", "value"),
    [("int8", 3, 4), ("int8", 3, 5), ("int8", 5, 2), ("int8", 6, 4), ("kivi", 5, 1), ("kivi", 6, 8), ("kivi", 4, 8.0)],
)  # fmt: skip
def test_tokens_that_are_packed_otherwise_than_the_method_does_are_refused(method, place, value, tmp_path):
    model = saved(method, path := tmp_path / "cache")
    file = File(path.read_bytes())
    file.field("packed")["tuple"][0]["packed"][place] = value
    path.write_bytes(file.seal())
    with pytest.raises(FormatError, match="layer 0: "):
        load_cache(path, model)


def test_layers_of_unequal_batches_are_refused(tmp_path):
    model = saved("streaming-llm", path := tmp_path / "cache")
    file = File(path.read_bytes())
    for part in file.field("tokens")["tuple"]:
        file.change_array(part, lambda x: np.tile(x, (2, 1, 1, 1)))
    path.write_bytes(file.seal())
    with pytest.raises(FormatError, match="1 and 2 sequences"):
        load_cache(path, model)


def generate(model, caches):
    for size in (70, 1):
        mx.eval(model(mx.array([tiny_tokens(size)]), cache=caches))


def places(tree, at=()):
    """Paths to all values in a tree of lists and dicts."""
    yield at
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from places(tree[key], (*at, key))


def changes(file):
    """Copies of a file with one value of the first layer, or one of its arrays, changed."""
    values = count()
    for at in places(file.header["layers"][0]):
        if at:
            new = copy.deepcopy(file)
            parent = new.header["layers"][0]
            for key in at[:-1]:
                parent = parent[key]
            parent[at[-1]] = (None, -1, 1.5, {"array": 0}, {"tuple": []}, "x")[next(values) % 6]
            yield new
    for i in range(len(file.header["arrays"]) // 2):
        for change in (lambda x: x[..., :-1], lambda x: x[:, 1:], lambda x: x[None], np.ones_like):
            new = copy.deepcopy(file)
            new.change_array({"array": i}, change)
            yield new
        new = copy.deepcopy(file)
        new.header["arrays"][i][0] = {"float16": "bfloat16", "float32": "int32"}.get(
            new.header["arrays"][i][0], "float32"
        )
        yield new


@pytest.mark.parametrize("method", METHODS)
def test_every_single_change_is_refused_while_loading_or_harms_nothing(method, tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "fingerprint", lambda model: "a.b")  # hashing takes longer than loading
    model = saved(method, path := tmp_path / "cache")
    original, refused = File(path.read_bytes()), 0
    for file in islice(changes(original), 0, None, 2):
        path.write_bytes(file.seal())
        try:
            caches = load_cache(path, model)
        except MlxkvError:
            refused += 1
        else:
            generate(model, caches)
    assert refused >= 10


def test_a_forged_state_of_mlx_lms_own_cache_is_refused(tmp_path):
    model, path = tiny_model("lfm2"), tmp_path / "cache"
    caches = make_cache(model, "int8")
    mx.eval(model(mx.array([tiny_tokens(LENGTH)]), cache=caches))
    save_cache(path, model, caches)
    file = File(path.read_bytes())
    convolution = file.header["layers"][0][2]["tuple"][0]["list"][0]
    file.change_array(convolution, lambda x: np.tile(x, (1, 2, 1)))
    path.write_bytes(file.seal())
    with pytest.raises(FormatError, match="layer 0: array 0 is"):
        load_cache(path, model)


def test_a_class_that_the_model_does_not_make_is_refused(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    live = make_cache(model, "int8")[1]
    caches = assemble_cache(model, {1: (type(live), live.config)})
    mx.eval(model(mx.array([tiny_tokens(9)]), cache=caches))
    save_cache(path, model, caches)
    for name in ("RotatingKVCache", "os.system", "", "mlx_lm.models.cache.KVCache"):
        forged(path, lambda header, name=name: header["layers"][0].__setitem__(0, name))
        with pytest.raises(FormatError, match="where this model has a KVCache"):
            load_cache(path, model)


@pytest.mark.parametrize(
    "method",
    ["os", "antigravity", "evil", "evil.py", "{folder}/evil", "{folder}/evil.py", "mlxkv.live.methods.int8", "Int8Cache",
     "_smartkv_budget", "", None, 3, ["int8"], {"int8": 1}],
)  # fmt: skip
def test_a_file_that_names_an_unknown_method_imports_nothing(method, tmp_path, monkeypatch):
    model = saved("int8", path := tmp_path / "cache")
    load_cache(path, model)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    method = method.format(folder=tmp_path) if isinstance(method, str) else method
    forged(path, lambda header: header["methods"][0].__setitem__(0, method))
    before = set(sys.modules)
    with pytest.raises(FormatError, match="which is not installed here"):
        load_cache(path, model)
    assert set(sys.modules) == before
    assert not (tmp_path / "ran").exists()


def test_a_container_of_a_codec_is_no_live_cache(tmp_path):
    model = saved("int8", path := tmp_path / "cache")
    forged(path, lambda header: (header.pop("kind"), header.update(method="kvtc")))
    with pytest.raises(FormatError, match="no saved live cache"):
        load_cache(path, model)

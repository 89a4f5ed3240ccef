"""Saved live caches: what is read back goes on exactly as the original would, and damage is found."""

import sys

import mlx.core as mx
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from forging import PREAMBLE, forge, header_of
from live_checks import METHODS, small
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import detach, make_cache
from mlxkv.live.serialization import load_cache, save_cache

START, NEXT = mx.array([tiny_tokens(100)]), [mx.array([tiny_tokens(n, seed=n)]) for n in (1, 5, 1)]


def filled(model, method):
    caches = make_cache(model, method, **small(method))
    mx.eval(model(START, cache=caches))
    return caches


@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_cache_goes_on_bit_for_bit(method, architecture, tmp_path):
    model = tiny_model(architecture)
    caches = filled(model, method)
    save_cache(tmp_path / "cache", model, caches)
    detach(model)  # loading has to bring the seam with it
    loaded = load_cache(tmp_path / "cache", model)
    assert [entry.nbytes for entry in loaded] == [entry.nbytes for entry in caches]
    for tokens in NEXT:
        assert mx.array_equal(model(tokens, cache=loaded), model(tokens, cache=caches))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_batches_are_kept(method, tmp_path):
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    caches = make_cache(model, method, **small(method))
    mx.eval(model(mx.repeat(START, 2, axis=0), cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert loaded[0].config == caches[0].config
    for old, new in zip(caches[0].state, loaded[0].state, strict=True):
        assert old.dtype == new.dtype
        assert mx.array_equal(old, new)


def test_sliding_window_layers_keep_mlx_lms_cache_which_is_saved_with_the_others(tmp_path):
    model = tiny_model("llama", layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    caches, stock = make_cache(model, "full"), make_prompt_cache(model)
    assert type(caches[1]) is RotatingKVCache
    assert mx.array_equal(model(START, cache=caches), model(START, cache=stock))
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    for tokens in NEXT:
        expected = model(tokens, cache=stock)
        assert mx.array_equal(model(tokens, cache=caches), expected)
        assert mx.array_equal(model(tokens, cache=loaded), expected)


def test_an_empty_cache_can_be_saved(tmp_path):
    model = tiny_model("lfm2")
    save_cache(tmp_path / "cache", model, make_cache(model, "int8"))
    loaded = load_cache(tmp_path / "cache", model)
    assert [entry.offset for entry in loaded if isinstance(entry, LayerCache)] == [0, 0]


def test_only_live_caches_are_saved(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="make_cache makes them"):
        save_cache(tmp_path / "cache", model, make_prompt_cache(model))
    caches = filled(model, "int8")
    caches[0].tail = object()
    with pytest.raises(InputError, match="object"):
        save_cache(tmp_path / "cache", model, caches)
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tmp_path):
    save_cache(tmp_path / "cache", tiny_model("llama"), filled(tiny_model("llama"), "int8"))
    for other in (tiny_model("llama", seed=1), tiny_model("qwen3"), tiny_model("llama", head_dim=16)):
        with pytest.raises(MismatchError, match="another model"):
            load_cache(tmp_path / "cache", other)


def test_every_changed_or_missing_byte_is_noticed(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    save_cache(path, model, filled(model, "kivi"))
    data = path.read_bytes()
    for place in [8, 20, 40, *range(100, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(FormatError):
            load_cache(path, model)
    path.write_bytes(data[:-1])
    with pytest.raises(FormatError, match="truncated"):
        load_cache(path, model)
    path.write_bytes(data[:PREAMBLE] + bytes([data[PREAMBLE] ^ 1]) + data[PREAMBLE + 1 :])
    with pytest.raises(ChecksumError, match="damaged"):
        load_cache(path, model)


def forged(path, change):
    """Rewrite the header with fitting checksums, as an attacker would."""
    header, body = header_of(path.read_bytes())
    change(header)
    path.write_bytes(forge(header, body))


CHANGES = {
    "kind": lambda h: h.update(kind="something"),
    "no method": lambda h: h.pop("method"),
    "settings": lambda h: h.update(settings=3),
    "fewer layers": lambda h: h["layers"].pop(),
    "fewer arrays": lambda h: h["arrays"].pop(),
    "offset": lambda h: h["layers"][0].__setitem__(0, -1),
    "fewer tokens seen": lambda h: h["layers"][0].__setitem__(0, 99),
    "parts": lambda h: h["layers"][0][1]["list"].pop(),
    "an unknown kind": lambda h: h["layers"][0].__setitem__(1, {"pickle": []}),
    "two kinds": lambda h: h["layers"][0].__setitem__(1, {"list": [], "tuple": []}),
    "type": lambda h: h["arrays"][0].__setitem__(0, "object"),
    "shape": lambda h: h["arrays"][0].__setitem__(1, [1, 2, 3, 4]),
    "axes": lambda h: h["arrays"][0].__setitem__(1, [1] * 9),
    "negative": lambda h: h["arrays"][0].__setitem__(1, [-1, -2]),
    "values as keys": lambda h: h["layers"][0][1]["list"][1]["tuple"].pop(),
    "numbers as a tail": lambda h: h["layers"][0][1]["list"].__setitem__(1, {"tuple": [1, 2]}),
    "three arrays as a tail": lambda h: h["layers"][0][1]["list"][1]["tuple"].append({"array": 0}),
    "nothing of an array": lambda h: h["layers"][0][1]["list"].__setitem__(1, 7),
    "coding": lambda h: h["sections"][0].__setitem__(1, "deflate"),
    "bits": lambda h: h["layers"][0][1]["list"][0]["tuple"][0]["packed"].__setitem__(3, 5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_forged_header_is_a_typed_error(name, tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    save_cache(path, model, filled(model, "int8"))
    forged(path, lambda header: None)
    load_cache(path, model)
    forged(path, CHANGES[name])
    with pytest.raises((FormatError, InputError, MismatchError)):
        load_cache(path, model)


@pytest.mark.parametrize(("part", "value"), [(3, 5), (4, "much"), (2, None), (3, {"list": []})])
def test_what_is_no_array_where_a_method_has_one_is_refused(part, value, tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    save_cache(path, model, filled(model, "mp-kvm"))
    forged(path, lambda header: header["layers"][0][1]["list"][0]["tuple"].__setitem__(part, value))
    with pytest.raises(FormatError, match="should have arrays as its centroids"):
        load_cache(path, model)


@pytest.mark.parametrize(
    "method",
    ["os", "antigravity", "evil", "evil.py", "{folder}/evil", "{folder}/evil.py", "mlxkv.live.methods.int8", "Int8Cache",
     "_smartkv_budget", "", None, 3, ["int8"], {"int8": 1}],
)  # fmt: skip
def test_a_file_that_names_an_unknown_method_imports_nothing(method, tmp_path, monkeypatch):
    model, path = tiny_model("llama"), tmp_path / "cache"
    save_cache(path, model, filled(model, "int8"))
    load_cache(path, model)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    method = method.format(folder=tmp_path) if isinstance(method, str) else method
    forged(path, lambda header: header.update(method=method))
    before = set(sys.modules)
    with pytest.raises(FormatError, match="which is not installed here"):
        load_cache(path, model)
    assert set(sys.modules) == before
    assert not (tmp_path / "ran").exists()


def test_a_container_of_a_codec_is_no_live_cache(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "cache"
    save_cache(path, model, filled(model, "int8"))
    forged(path, lambda header: (header.pop("kind"), header.update(method="kvtc")))
    with pytest.raises(FormatError, match="no saved live cache"):
        load_cache(path, model)

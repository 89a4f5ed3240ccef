"""mlx-lm's own prompt cache files: read as mlx-lm reads them, and without trust."""

import json
import struct

import mlx.core as mx
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from mlx_lm.models.cache import (
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from zoo.build import build

from mlxkv.errors import FormatError, InputError, MismatchError, MlxkvError, UnsupportedError
from mlxkv.live.prompt_files import describe_prompt_cache, read_prompt_cache


def saved(path, model, cache=None, length=20, batch=1):
    cache = make_prompt_cache(model) if cache is None else cache
    model(mx.array([tiny_tokens(length)] * batch), cache=cache)
    save_prompt_cache(str(path), cache, {"model": "tiny"})
    return path


def rows(cache, model):
    """What the model says next of three tokens, one at a time."""
    return mx.concatenate([model(mx.array([[token]]), cache=cache)[:, -1] for token in (3, 5, 7)])


def parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def forge(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_model_goes_on_as_with_mlx_lms_own_loading(name, tmp_path):
    model = tiny_model(name)
    path = saved(tmp_path / "a.safetensors", model)
    assert mx.array_equal(rows(read_prompt_cache(path, model), model), rows(load_prompt_cache(str(path)), model))


# Lists of caches, an indexer without values, a layer without attention, a state that grows with the first tokens.
@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl", "nemotron-nas", "longcat_flash_ngram"])
def test_caches_of_every_kind_are_read(name, tmp_path):
    model = build(name)
    path = saved(tmp_path / "a.safetensors", model)
    assert describe_prompt_cache(path)["tokens"] == 20
    assert mx.array_equal(rows(read_prompt_cache(path, model), model), rows(load_prompt_cache(str(path)), model))


@pytest.mark.parametrize("made", [lambda: RotatingKVCache(16, keep=4), lambda: QuantizedKVCache(32, 8)])
@pytest.mark.parametrize("length", [5, 40])
def test_what_generate_puts_in_place_of_a_cache_is_taken_too(made, length, tmp_path):
    model = tiny_model("llama", head_dim=32)
    path = saved(tmp_path / "a.safetensors", model, [made() for _ in range(2)], length)
    expected = rows(load_prompt_cache(str(path)), model)
    assert mx.allclose(rows(read_prompt_cache(path, model), model), expected, atol=1e-5)


def test_half_precision_is_widened_where_the_model_computes_in_float32(tmp_path):
    model = tiny_model("llama")
    cache = make_prompt_cache(model)
    model(mx.array([tiny_tokens(20)]), cache=cache)
    for entry in cache:
        entry.keys, entry.values = entry.keys.astype(mx.bfloat16), entry.values.astype(mx.bfloat16)
    save_prompt_cache(str(tmp_path / "a.safetensors"), cache)
    read = read_prompt_cache(tmp_path / "a.safetensors", model)
    assert {entry.keys.dtype for entry in read} == {mx.float32}
    assert mx.array_equal(read[0].keys, cache[0].keys[..., :20, :].astype(mx.float32))


def test_a_file_is_described_without_its_arrays(tmp_path):
    facts = describe_prompt_cache(saved(tmp_path / "a.safetensors", tiny_model("lfm2")))
    assert facts["caches"] == {"ArraysCache": 2, "KVCache": 2}
    assert (facts["layers"], facts["tokens"], facts["dtypes"]) == (4, 20, ["F32"])
    assert facts["metadata"] == {"model": "tiny"}


def test_another_models_file_is_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", tiny_model("llama"))
    for other in (
        tiny_model("llama", num_hidden_layers=3),
        tiny_model("llama", head_dim=16),
        tiny_model("llama", num_key_value_heads=4),
        tiny_model("lfm2"),
        tiny_model("glm4_moe_lite", num_hidden_layers=2),
    ):
        with pytest.raises(MismatchError):
            read_prompt_cache(path, other)


def test_a_batch_of_texts_is_refused(tmp_path):
    model = tiny_model("lfm2")
    with pytest.raises(UnsupportedError, match="2 texts"):
        read_prompt_cache(saved(tmp_path / "a.safetensors", model, batch=2), model)


def test_other_safetensors_files_are_not_prompt_caches(tmp_path):
    model = tiny_model("llama")
    mx.save_safetensors(str(tmp_path / "w.safetensors"), {"w": mx.ones(3)}, {"format": "mlx"})
    with pytest.raises(InputError, match="is no prompt cache of mlx-lm"):
        read_prompt_cache(tmp_path / "w.safetensors", model)


def forged_classes(header, body):
    header["__metadata__"]["1.0"] = "os.system"


def forged_missing_array(header, body):
    del header["0.0"]


def forged_gap(header, body):
    header["0.0"]["data_offsets"][0] -= 1


def forged_shape(header, body):
    header["0.0"]["shape"] = [1, 2, 2**40, 8]


def forged_negative(header, body):
    header["0.0"]["shape"] = [1, 2, -256, -8]


def forged_type(header, body):
    header["0.0"]["dtype"] = "F4"


def forged_metadata(header, body):
    header["__metadata__"]["2.0"] = 3


def forged_offset(header, body):
    start, end = header["1.2"]["data_offsets"]
    body[start:end] = struct.pack("<i", 2000)


def forged_offsets(header, body):
    for name in ("0.2", "1.2"):
        start, end = header[name]["data_offsets"]
        body[start:end] = struct.pack("<i", 2000)


def forged_negative_offsets(header, body):
    for name in ("0.2", "1.2"):
        start, end = header[name]["data_offsets"]
        body[start:end] = struct.pack("<i", -5)


def forged_nan(header, body):
    start = header["0.0"]["data_offsets"][0]
    body[start : start + 4] = b"\xff" * 4


def forged_index(header, body):
    header["__metadata__"]["1.99999999999"] = "KVCache"
    header["__metadata__"]["2.99999999999.0"] = "0.0"
    del header["__metadata__"]["1.1"]


def forged_entry(header, body):
    header["0.0"] = [1]


@pytest.mark.parametrize("change", [value for name, value in globals().copy().items() if name.startswith("forged_")])
def test_a_forged_file_is_refused_with_a_typed_error(change, tmp_path):
    model = tiny_model("llama")
    path = saved(tmp_path / "a.safetensors", model)
    header, body = parts(path)
    body = bytearray(body)
    change(header, body)
    with pytest.raises(MlxkvError):
        read_prompt_cache(forge(path, header, bytes(body)), model)


def set_text(header, body, name, text):
    header[name]["shape"] = [len(text)]
    header[name]["data_offsets"] = [len(body), len(body) + 4 * len(text)]
    body += text.encode("utf-32-le")


def other_child(header, body):
    set_text(header, body, "0.1.1", "os.system")


def long_child(header, body):
    set_text(header, body, "0.1.1", "KVCache" * 100)


def child_is_missing(header, body):
    del header["0.1.1"]


def child_is_no_text(header, body):
    places = {value: key for key, value in header["__metadata__"].items()}
    header["__metadata__"][places["0.1.1"][:-1] + "1"] = "scalar"


def empty_where_there_are_tokens(header, body):
    known = sum(1 for key in header["__metadata__"] if key.startswith("2.") and key.endswith(".1"))
    for slot in (0, 1):
        header["__metadata__"] |= {
            f"2.{known + slot + 1}.{i}": each for i, each in enumerate((f"0.0.0.{slot}", "none"))
        }


@pytest.mark.parametrize(
    "change", [other_child, long_child, child_is_missing, child_is_no_text, empty_where_there_are_tokens]
)
def test_a_forged_list_of_caches_is_refused(change, tmp_path):
    model = build("deepseek_v32")
    path = saved(tmp_path / "a.safetensors", model)
    header, body = parts(path)
    body = bytearray(body)
    change(header, body)
    with pytest.raises(MlxkvError):
        read_prompt_cache(forge(path, header, bytes(body)), model)


@pytest.mark.parametrize("part", ["keys", "values", "offset"])
def test_tokens_of_a_layer_without_attention_are_refused(part, tmp_path):
    model = build("nemotron-nas")
    cache = make_prompt_cache(model)
    model(mx.array([tiny_tokens(20)]), cache=cache)
    setattr(cache[2], part, 20 if part == "offset" else cache[1].keys)
    save_prompt_cache(str(tmp_path / "a.safetensors"), cache)
    with pytest.raises(MlxkvError):
        read_prompt_cache(tmp_path / "a.safetensors", model)


def test_layers_that_are_lists_in_the_file_or_the_model_alone_are_refused(tmp_path):
    for of, other in (("deepseek_v32", "deepseek_v3"), ("deepseek_v3", "deepseek_v32")):
        path = saved(tmp_path / f"{of}.safetensors", build(of))
        with pytest.raises(MismatchError):
            read_prompt_cache(path, build(other))


def test_a_forged_window_is_refused(tmp_path):
    model = tiny_model("llama")
    path = saved(tmp_path / "a.safetensors", model, [RotatingKVCache(16, keep=4) for _ in range(2)], 40)
    header, body = parts(path)
    for slot, value in ((3, 16), (3, -1), (4, 0), (4, 2**31 - 1), (5, 3), (5, 99), (5, -1)):
        changed = bytearray(body)
        for layer in range(2):
            start, end = header[f"{layer}.{slot}"]["data_offsets"]
            changed[start:end] = struct.pack("<i", value)
        with pytest.raises(MlxkvError):
            read_prompt_cache(forge(path, header, bytes(changed)), model)


def test_a_cut_file_is_damaged(tmp_path):
    model = tiny_model("llama")
    path = saved(tmp_path / "a.safetensors", model)
    data = path.read_bytes()
    for length in (0, 5, 8, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_prompt_cache(path, model)

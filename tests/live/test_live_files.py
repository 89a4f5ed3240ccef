"""Saved live caches: what is read back goes on exactly as the original would, and damage is found."""

import copy
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from forging import PREAMBLE, header_of
from live_checks import METHODS, small
from mlx_lm.models.cache import BatchKVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache

from mlxkv.errors import ChecksumError, FormatError, InputError, MismatchError
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import assemble_cache, detach, make_cache
from mlxkv.live.serialization import load_cache, save_cache
from mlxkv.live.trees import array_bytes

START, NEXT = mx.array([tiny_tokens(100)]), [mx.array([tiny_tokens(n, seed=n)]) for n in (1, 5, 1)]


def filled(model, method, tokens=START, **overrides):
    caches = make_cache(model, method, **(overrides or small(method)))
    mx.eval(model(tokens, cache=caches))
    return caches


def mixed(model, *methods):
    """A cache whose live layers have these methods, each a name with settings; None leaves mlx-lm's own."""
    made = [make_cache(model, name, **settings)[0] for name, settings in filter(None, methods)]
    classes = iter([(type(entry), entry.config) for entry in made])
    caches = assemble_cache(model, {layer: next(classes) for layer, method in enumerate(methods) if method})
    mx.eval(model(START, cache=caches))
    return caches


def goes_on_alike(model, caches, loaded):
    for tokens in NEXT:
        assert mx.array_equal(model(tokens, cache=loaded), model(tokens, cache=caches))


@pytest.mark.parametrize("architecture", DIFFERENT)
@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_cache_goes_on_bit_for_bit(method, architecture, tmp_path):
    model = tiny_model(architecture)
    caches = filled(model, method)
    save_cache(tmp_path / "cache", model, caches)
    detach(model)  # loading has to bring the seam with it
    loaded = load_cache(tmp_path / "cache", model)
    assert all(
        0 < after.nbytes <= before.nbytes for after, before in zip(loaded, caches)
    )  # allocated rows are not saved
    goes_on_alike(model, caches, loaded)


MIXED = {
    "methods": [("int8", {}), ("int4", {})],
    "settings": [("h2o", {"heavy": 12, "recent": 8}), ("h2o", {"heavy": 60, "recent": 20})],
    "kinds of state": [("mp-kvm", small("mp-kvm")), ("sketch-topk", small("sketch-topk"))],
    "none at the second layer": [("kivi", {"recent": 0}), None],
    "none at the first layer": [None, ("full", {})],
}


@pytest.mark.parametrize("methods", MIXED.values(), ids=MIXED)
def test_each_layer_comes_back_with_its_own_method_and_settings(methods, tmp_path):
    model = tiny_model("llama")
    caches = mixed(model, *methods)
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert [type(entry) for entry in loaded] == [type(entry) for entry in caches]
    assert [getattr(entry, "config", None) for entry in loaded] == [getattr(entry, "config", None) for entry in caches]
    goes_on_alike(model, caches, loaded)


def test_a_method_of_several_layers_is_described_once(tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    save_cache(tmp_path / "cache", model, mixed(model, ("int8", {}), ("int4", {}), ("int8", {})))
    header, _ = header_of((tmp_path / "cache").read_bytes())
    assert [name for name, _ in header["methods"]] == ["int8", "int4"]
    assert [row[0] for row in header["layers"]] == [0, 1, 0]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_batches_are_kept(method, tmp_path):
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    caches = make_cache(model, method, **small(method))
    mx.eval(model(mx.repeat(START, 2, axis=0), cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert loaded[0].config == caches[0].config
    held = ([entry.state_to_save() for entry in each] for each in (caches, loaded))
    for old, new in zip(*map(iter_arrays, held), strict=True):
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


def test_states_of_a_hybrid_keep_their_types_and_their_absence(tmp_path):
    model = tiny_model("lfm2")
    model.set_dtype(mx.bfloat16)
    caches = filled(model, "int8")
    caches[0][0] = caches[0][0].astype(mx.float32)  # as recurrent states are in some models
    caches[2][0] = None
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert loaded[0][0].dtype == mx.float32
    assert loaded[2][0] is None
    assert [type(entry) for entry in loaded] == [type(entry) for entry in caches]
    goes_on_alike(model, caches, loaded)


def test_an_empty_cache_can_be_saved(tmp_path):
    model = tiny_model("lfm2")
    save_cache(tmp_path / "cache", model, make_cache(model, "int8"))
    loaded = load_cache(tmp_path / "cache", model)
    assert [entry.offset for entry in loaded if isinstance(entry, LayerCache)] == [0, 0]


@pytest.mark.parametrize("method", METHODS)
def test_one_thread_loads_and_another_generates(method, tmp_path):
    model = tiny_model("llama")
    caches = filled(model, method)
    save_cache(tmp_path / "cache", model, caches)
    with ThreadPoolExecutor(1) as thread:
        loaded = thread.submit(load_cache, tmp_path / "cache", model).result()
    goes_on_alike(model, caches, loaded)


def taken_back(model, method):
    """A cache of 100 tokens of which the last 30 were taken back, and the rows of these as bytes."""
    caches = filled(model, method, **({"recent": 50} if method == "kivi" else {}))
    rows = unique_rows(caches, 30)
    for entry in caches:
        assert entry.trim(30) == 30
    return caches, rows


def unique_rows(caches, count):
    """The rows of the newest tokens that no older token has too."""
    start = caches[0].offset - count
    newest, older = (
        {row for entry in caches for row in rows_of(entry, tokens)}
        for tokens in (slice(start, start + count), slice(start))
    )
    return newest - older


def rows_of(entry, tokens):
    """The bytes of each of these tokens in each head."""
    stored = (entry.keys, entry.values) if not isinstance(entry, LayerCache) else entry.keys_and_values()
    rows = [x[..., tokens, :].reshape(-1, 1, x.shape[-1]) for x in stored]
    return [array_bytes(row) for part in rows for row in part]


@pytest.mark.parametrize("method", ["full", "int8", "int4", "kivi"])
def test_tokens_that_were_taken_back_never_reach_the_disk(method, tmp_path):
    model = tiny_model("llama")
    caches, rows = taken_back(model, method)
    save_cache(tmp_path / "cache", model, caches)
    data = (tmp_path / "cache").read_bytes()
    assert len(rows) > 100
    assert not any(row in data for row in rows)
    assert all(row in data for row in rows_of(caches[0], slice(69, 70)))
    goes_on_alike(model, caches, load_cache(tmp_path / "cache", model))


def test_taken_back_tokens_of_a_windowed_layer_never_reach_the_disk(tmp_path):
    model = tiny_model("llama", layer_types=["full_attention", "sliding_attention"], sliding_window=200)
    caches = make_cache(model, "full")
    mx.eval(model(START, cache=caches))
    rows = unique_rows(caches[1:], 30)
    caches[1].trim(30), caches[0]._trim(30)
    caches[0].offset = 70
    save_cache(tmp_path / "cache", model, caches)
    data = (tmp_path / "cache").read_bytes()
    assert not any(row in data for row in rows)
    goes_on_alike(model, caches, load_cache(tmp_path / "cache", model))


@pytest.mark.parametrize("window", [None, 300])
def test_a_file_holds_tokens_and_no_rows_that_were_only_allocated(window, tmp_path):
    sliding = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": window} if window else {}
    model = tiny_model("llama", **sliding)
    save_cache(tmp_path / "cache", model, filled(model, "full", START[:, :1], **{}))
    assert (tmp_path / "cache").stat().st_size < 3000  # with 256 rows of 2 x 2 x 8 floats a layer it was 65,000


@pytest.mark.parametrize("chunks", [[100], [40, 60], [99, 1], [1] * 20], ids=str)
def test_a_windowed_layer_is_saved_in_no_more_rows_than_its_window(chunks, tmp_path):
    model = tiny_model("llama", layer_types=["full_attention", "sliding_attention"], sliding_window=8)
    caches = make_cache(model, "full")
    for size in chunks:
        mx.eval(model(START[:, :size], cache=caches))
    save_cache(tmp_path / "cache", model, caches)
    loaded = load_cache(tmp_path / "cache", model)
    assert loaded[1].keys.shape[2] == 8
    goes_on_alike(model, caches, loaded)


def test_only_live_caches_are_saved(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(InputError, match="make_cache makes them"):
        save_cache(tmp_path / "cache", model, make_prompt_cache(model))
    caches = filled(model, "int8")
    caches[0].first = object()
    with pytest.raises(InputError, match="layer 0 cannot be saved: first should be KeysValues, not '<object"):
        save_cache(tmp_path / "cache", model, caches)
    assert not list(tmp_path.iterdir())


def swapped(model):
    caches = filled(model, "int8")
    return caches[::-1]


def of_another_model(model):
    return filled(tiny_model("llama", seed=1), "int8")


def other_kept_alive(model):
    other = tiny_model("llama", seed=1)
    OTHERS.append(other)
    return filled(other, "int8")


def of_another_rotation(model):
    return filled(tiny_model("llama", rope_theta=500.0), "int8")


def too_few(model):
    return filled(model, "int8")[:1]


def of_unequal_lengths(model):
    caches = filled(model, "int8")
    caches[1].trim(3)
    return caches


def interrupted(model):
    caches = filled(model, "int8")
    caches[1].update_and_fetch(mx.zeros((1, 2, 1, 8)), mx.zeros((1, 2, 1, 8)))
    caches[1].offset -= 1
    return caches


def shorter_plain_cache(model):
    caches = mixed(model, ("int8", {}), None)
    caches[1].trim(3)
    return caches


OTHERS = []
REFUSED = {
    swapped: (MismatchError, "the cache of layer 1 stands at layer 0"),
    of_another_model: (MismatchError, "made for another model"),
    other_kept_alive: (MismatchError, "made for another model"),
    of_another_rotation: (MismatchError, "made for another model"),
    too_few: (MismatchError, "1 caches, but the model has 2 layers"),
    of_unequal_lengths: (MismatchError, "97 and 100 tokens"),
    interrupted: (MismatchError, "interrupted"),
    shorter_plain_cache: (MismatchError, "97 and 100 tokens"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_would_not_come_back_right_is_refused_while_saving(case, tmp_path):
    model, (kind, message) = tiny_model("llama"), REFUSED[case]
    with pytest.raises(kind, match=message):
        save_cache(tmp_path / "cache", model, case(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", [BatchKVCache([0]), RotatingKVCache(64), QuantizedKVCache(), None], ids=lambda x: type(x).__name__
)
def test_a_cache_that_the_model_does_not_make_is_refused_while_saving(other, tmp_path):
    model = tiny_model("llama")
    caches = mixed(model, ("int8", {}), None)
    caches[1] = other
    if isinstance(other, RotatingKVCache | QuantizedKVCache):
        other.offset = 100
    with pytest.raises(InputError, match=r"layer 1 cannot be saved: there is a .*, where this model has a KVCache"):
        save_cache(tmp_path / "cache", model, caches)


def test_the_same_weights_in_another_object_are_the_same_model_and_copies_are_caches_too(tmp_path):
    model = tiny_model("llama")
    caches = copy.deepcopy(filled(model, "int8"))
    save_cache(tmp_path / "cache", tiny_model("llama"), caches)
    goes_on_alike(model, caches, load_cache(tmp_path / "cache", tiny_model("llama")))


def test_another_model_is_refused(tmp_path):
    model = tiny_model("llama")
    save_cache(tmp_path / "cache", model, filled(model, "int8"))
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

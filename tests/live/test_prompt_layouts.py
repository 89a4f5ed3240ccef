"""Prompt caches that mlx-lm 0.31.3 and 0.32.2 themselves wrote, in tests/fixtures/prompt_caches: read, and gone on from."""

import json
import struct

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.models.cache import load_prompt_cache
from prompt_cache_models import FILES, FOLDER, exact_model, next_logits, tokens_of

from mlxkv.errors import FormatError, MismatchError, MlxkvError, UnsupportedError
from mlxkv.identity import fingerprint
from mlxkv.live.prompt_files import describe_prompt_cache, read_prompt_cache, write_prompt_cache

VERSIONS = ("0.31.3", "0.32.2")


def path_of(version, name):
    return FOLDER / version / f"{name}.safetensors"


def parts(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def forged(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_a_model_goes_on_from_what_that_version_wrote_as_it_did_there(name, version):
    model = exact_model(FILES[name][0])
    expected = mx.load(str(FOLDER / version / "logits.npz"))[name]
    assert mx.allclose(next_logits(model, read_prompt_cache(path_of(version, name), model)), expected, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_every_file_says_its_layout_and_how_many_tokens_it_holds(name, version):
    facts = describe_prompt_cache(path_of(version, name))
    assert (facts["layout"], facts["tokens"]) == (version[:4], len(tokens_of(name)))
    assert facts["metadata"] == {"model": f"exact/{FILES[name][0]}"}


@pytest.mark.parametrize("name", FILES)
def test_both_layouts_of_a_cache_hold_the_same(name):
    model = exact_model(FILES[name][0])
    old, new = (next_logits(model, read_prompt_cache(path_of(version, name), model)) for version in VERSIONS)
    assert mx.allclose(old, new, atol=1e-4)  # arrays of other sizes are multiplied in another order


@pytest.mark.parametrize(
    ("name", "key", "text"),
    [
        ("rotating", "0.0.0", "16"),
        ("rotating", "0.0.1", "0"),
        ("rotating", "0.0.2", "-1"),
        ("rotating", "0.0.3", "99"),
        ("rotating", "0.0.3", "1" * 5000),
        ("rotating", "0.0.2", "eleven"),
        ("quantized-4", "0.0.0", "22"),
        ("quantized-4", "0.0.1", "64"),
        ("quantized-4", "0.0.2", "7"),
        ("chunks-past", "0.0.1", "298"),
        ("chunks-past", "0.0.1", "40"),
        ("chunks-past", "0.0.0", "None"),
        ("whole", "2.0", "os.system"),
        ("whole", "2.0", "QuantizedKVCache"),
        ("whole", "2.1", "KVCache"),
        ("latents", "0.0.0.0", "os.system"),
        ("latents", "0.0.0.1", "QuantizedKVCache"),
        ("latents", "0.0.0.2", "KVCache"),
    ],
)
def test_old_files_with_forged_text_are_refused(name, key, text, tmp_path):
    header, body = parts(path_of("0.31.3", name))
    header["__metadata__"][key] = text
    with pytest.raises(MlxkvError):
        read_prompt_cache(forged(tmp_path / "a", header, body), exact_model(FILES[name][0]))


def test_old_files_that_lack_a_part_are_refused(tmp_path):
    for name, key in (("rotating", "0.0.3"), ("quantized-8", "0.0.1"), ("whole", "2.0"), ("latents", "0.0.0.1")):
        header, body = parts(path_of("0.31.3", name))
        del header["__metadata__"][key]
        with pytest.raises(MlxkvError):
            read_prompt_cache(forged(tmp_path / "a", header, body), exact_model(FILES[name][0]))


def test_values_of_width_0_are_zeros_in_an_indexer_alone(tmp_path):
    header, body = parts(path_of("0.31.3", "whole"))
    start, end = header["0.0"]["data_offsets"]
    header["0.0"]["data_offsets"] = [0, end - start]
    header["0.1"] |= {"shape": [1, 1, 21, 0], "data_offsets": [0, 0]}
    with pytest.raises(MismatchError, match="does not fit"):
        read_prompt_cache(forged(tmp_path / "a", header, body[start:end]), exact_model("llama"))


def test_chunks_whose_number_of_tokens_nothing_tells_are_refused(tmp_path):
    header, body = parts(path_of("0.31.3", "chunks-past"))
    header["__metadata__"]["2.3"] = "ChunkedKVCache"
    with pytest.raises(MlxkvError):
        read_prompt_cache(forged(tmp_path / "a", header, body), exact_model("chunks"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_batch_of_texts_is_refused(version, tmp_path):
    header, body = parts(path_of(version, "whole"))
    for key in ("0.0", "0.1"):
        shape = header[key]["shape"]
        assert shape[2] % 3 == 0 or version == "0.32.2"
        header[key]["shape"] = [2, 1, shape[2] // 2, 8] if version == "0.32.2" else [3, 1, 7, 8]
    with pytest.raises(UnsupportedError, match="texts"):
        read_prompt_cache(forged(tmp_path / "a", header, body), exact_model("llama"))


@pytest.mark.parametrize("name", FILES)
def test_a_cut_old_file_is_damaged(name, tmp_path):
    data = path_of("0.31.3", name).read_bytes()
    for length in (0, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(FormatError):
            describe_prompt_cache(tmp_path / "a")


def rewritten(version, name, path, layout, /, **more):
    model = exact_model(FILES[name][0])
    write_prompt_cache(path, model, read_prompt_cache(path_of(version, name), model), layout=layout, **more)
    return model


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][0] != "chunks"])
def test_written_in_the_old_layout_a_cache_is_what_mlx_lm_0_31_3_wrote(name, tmp_path):
    rewritten("0.32.2", name, tmp_path / "a", "0.31", name=f"exact/{FILES[name][0]}")
    ours, theirs = mx.load(str(tmp_path / "a"), format="safetensors"), mx.load(str(path_of("0.31.3", name)))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
    (ours, _), (theirs, _) = parts(tmp_path / "a"), parts(path_of("0.31.3", name))
    own = {"1.mlxkv_fingerprint", "1.tokenizer_config"}
    assert {k: v for k, v in ours["__metadata__"].items() if k not in own} == theirs["__metadata__"]


@pytest.mark.parametrize("name", ["chunks", "chunks-past"])
def test_chunks_that_0_31_would_lose_are_not_written_in_its_layout(name, tmp_path):
    with pytest.raises(UnsupportedError, match="goes on wrongly"):
        rewritten("0.32.2", name, tmp_path / "a", "0.31")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_written_mlx_lm_itself_goes_on_from(name, version, tmp_path):
    model = rewritten(version, name, tmp_path / "a.safetensors", "0.32", tokens=tokens_of(name), texts={"of": "me"})
    cache, texts = load_prompt_cache(str(tmp_path / "a.safetensors"), return_metadata=True)
    expected = next_logits(model, read_prompt_cache(path_of(version, name), model))
    assert mx.array_equal(next_logits(model, cache), expected)
    assert mx.array_equal(next_logits(model, read_prompt_cache(tmp_path / "a.safetensors", model)), expected)
    facts = describe_prompt_cache(tmp_path / "a.safetensors")
    assert facts["token_ids"] == tokens_of(name)
    assert (texts["of"], facts["metadata"]["of"], facts["model_fingerprint"]) == ("me", "me", fingerprint(model))


def test_rows_that_are_only_allocated_are_not_written(tmp_path):
    rewritten("0.32.2", "whole", tmp_path / "a", "0.32")
    assert mx.load(str(tmp_path / "a"), format="safetensors")["0.0"].shape == (1, 1, 21, 8)


@pytest.mark.parametrize("layout", ["0.32", "0.31"])
def test_what_mlxkv_wrote_is_refused_for_other_weights(layout, tmp_path):
    model = rewritten("0.32.2", "whole", tmp_path / "a", layout)
    other = exact_model.__wrapped__("llama")
    other.update(tree_map(lambda weights: weights * 2, other.parameters()))
    with pytest.raises(MismatchError, match="another model or other weights"):
        read_prompt_cache(tmp_path / "a", other)
    read_prompt_cache(tmp_path / "a", model)


@pytest.mark.parametrize("text", ["1 2", "x " * 20 + "x", "-1 " * 20 + "1", "1" * 5000])
def test_forged_tokens_are_refused(text, tmp_path):
    rewritten("0.32.2", "whole", tmp_path / "a", "0.32", tokens=tokens_of("whole"))
    header, body = parts(tmp_path / "a")
    header["__metadata__"]["0.mlxkv_tokens"] = text
    with pytest.raises(FormatError, match="names tokens"):
        describe_prompt_cache(forged(tmp_path / "a", header, body))

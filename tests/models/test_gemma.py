"""Gemma 3 270M converted from its GGUF file: names, norms, a tokenizer equal to SentencePiece's, and the real model where it is installed."""

import json
import math
import pydoc_data.topics
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load
from mlx_lm.models.gemma3_text import Model, ModelArgs

from mlxkv import lm
from mlxkv.bundled import gemma3
from mlxkv.errors import ModelNotFoundError

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
USER_DEFINED = ["\n", "\n\n", "  ", "<b>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# As SentencePiece scores them: a piece is made of better ones, and letters are last.
MERGED = ["th", "▁th", "he", "the", "▁the", "aa", "in", "aaa", "en", "then", "ab", "▁t"]
LETTERS = [*"abehint▁", "é"]
PIECES = [*CONTROL, *USER_DEFINED, *BYTES, *MERGED, *LETTERS]
KINDS = [3] * len(CONTROL) + [4] * len(USER_DEFINED) + [6] * 256 + [1] * (len(MERGED) + len(LETTERS))
SCORES = [-1000.0] * (len(PIECES) - len(MERGED) - len(LETTERS)) + [-float(i) for i in range(len(MERGED) + len(LETTERS))]
HIDDEN, LAYERS, HEADS, DIM, WIDE = 64, 6, 2, 32, 32


def fields():
    """Metadata of a small GGUF file."""
    ids = {"padding": 0, "eos": 1, "bos": 2, "unknown": 3}
    lists = {"tokens": PIECES, "scores": SCORES, "token_type": KINDS}
    sizes = {"embedding_length": HIDDEN, "block_count": LAYERS, "feed_forward_length": WIDE, "context_length": 640}
    attention = {"head_count": HEADS, "head_count_kv": 1, "key_length": DIM, "sliding_window": 8}
    return {
        **{f"tokenizer.ggml.{name}": value for name, value in lists.items()},
        **{f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items()},
        **{f"gemma3.{name}": value for name, value in sizes.items()},
        **{f"gemma3.attention.{name}": value for name, value in attention.items()},
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.rope.freq_base": 1e6,
    }


@pytest.fixture(scope="module")
def tokenizer():
    return gemma3._tokenizer(fields())


@pytest.fixture(scope="module")
def gemma():
    """The model and its tokenizer."""
    try:
        gemma3.find_gguf()
    except ModelNotFoundError as error:
        if not gemma3.converted(gemma3.NAME):
            pytest.skip(str(error))
    return lm.load(gemma3.NAME)


def sentencepiece(text):
    """What SentencePiece's BPE does, slowly: user-defined pieces first, then again and again the best pair of neighbours."""
    text, start, parts = text.replace(" ", "▁"), 0, []
    defined = sorted((piece.replace(" ", "▁") for piece in USER_DEFINED), key=len, reverse=True)
    scores = {piece: score for piece, score, kind in zip(PIECES, SCORES, KINDS) if kind == 1}
    while start < len(text):
        found = next((piece for piece in defined if text.startswith(piece, start)), None)
        parts.append((found or text[start], bool(found)))
        start += len(parts[-1][0])
    while True:
        pairs = [
            (scores[a + b], -i) for i, ((a, x), (b, y)) in enumerate(pairwise(parts)) if not x | y and a + b in scores
        ]
        if not pairs:
            break
        i = -max(pairs)[1]
        parts[i : i + 2] = [(parts[i][0] + parts[i + 1][0], False)]
    known = {piece.replace(" ", "▁") if kind == 4 else piece: i for i, (piece, kind) in enumerate(zip(PIECES, KINDS))}
    return [
        id_
        for part, _ in parts
        for id_ in ([known[part]] if part in known else [known[f"<0x{b:02X}>"] for b in part.encode()])
    ]


# Its tokenizer


@given(st.lists(st.sampled_from([*MERGED, *USER_DEFINED, *LETTERS, " ", "ß", "🙂", "<"]), max_size=9))
def test_text_becomes_the_tokens_that_sentencepiece_makes(tokenizer, parts):
    text = "".join(parts)
    assert tokenizer.encode(text, add_special_tokens=False) == sentencepiece(text)


@pytest.mark.parametrize("text", ["the then", "  in\n\n\nhe  <b>aaaa", " ", "the ßß🙂\x00é", "\n"], ids=ascii)
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_text_begins_with_its_token_and_turns_are_single_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, type(tokenizer).from_pretrained(tmp_path)):
        assert lm.text_start(each) == [2]
        assert each.encode("the") == [2, PIECES.index("the")]
        assert each.encode("<start_of_turn>the<end_of_turn>", add_special_tokens=False) == [4, PIECES.index("the"), 5]
        assert each.bos_token == "<bos>"
        assert len(each.encode("<unused0>", add_special_tokens=False)) > 1


def test_a_conversation_is_turns_of_user_and_model_and_the_system_speaks_in_the_first(tokenizer):
    said = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.apply_chat_template(said[1:2], tokenize=False) == "<bos><start_of_turn>user\nHi<end_of_turn>\n"


# Its weights


def gguf_names():
    """Names of a file's tensors, with their shapes as mlx-lm has them."""
    layer = {
        "attn_q": (HEADS * DIM, HIDDEN), "attn_k": (DIM, HIDDEN), "attn_v": (DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * DIM),
        "attn_q_norm": (DIM,), "attn_k_norm": (DIM,), "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN),
        "ffn_down": (HIDDEN, WIDE), "attn_norm": (HIDDEN,), "post_attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,),
        "post_ffw_norm": (HIDDEN,),
    }  # fmt: skip
    layers = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return {"token_embd.weight": (len(PIECES), HIDDEN), "output_norm.weight": (HIDDEN,), **layers}


def test_names_and_shapes_are_those_of_mlx_lms_model():
    config = gemma3._config(fields())
    assert (config["eos_token_id"], config["bos_token_id"], config["vocab_size"]) == ([1, 5], 2, len(PIECES))
    model = Model(ModelArgs.from_dict(config))
    model.sanitize({})
    shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
    assert {gemma3._name(name): shape for name, shape in gguf_names().items()} == shapes


def test_a_small_file_is_converted_into_a_directory_that_mlx_lm_loads(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in gguf_names().items()}
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "gemma3")
    for key, value in fields().items():
        add = {list: writer.add_array, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(key, value)
    for name, array in arrays.items():
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            arrays[name] = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gemma3, "_CHUNK", 10 * HIDDEN)  # some rows at a time, with a rest
    (tmp_path / "model").mkdir()
    gemma3.convert(tmp_path / "small.gguf", tmp_path / "model")
    model, tokenizer = mlx_lm_load(str(tmp_path / "model"))[:2]
    for name, array in arrays.items():
        found = dict(tree_flatten(model.parameters()))[gemma3._name(name)]
        assert found.dtype == mx.bfloat16
        expected = mx.array(array - 1 if "norm" in name else array).astype(mx.bfloat16)
        assert mx.array_equal(found, expected), name
    assert tokenizer.eos_token_ids == {1, 5}
    assert lm.text_start(tokenizer) == [2]
    assert model(mx.array([tokenizer.encode("the")])).shape == (1, 2, len(PIECES))


# What is installed


def test_the_parts_are_put_together_only_if_they_are_the_known_file(tmp_path, monkeypatch):
    parts = [tmp_path / f"part{i}" for i in range(2)]
    for part in parts:
        part.write_bytes(part.name.encode())
    with pytest.raises(ModelNotFoundError, match=r"damaged or of another version.*--force-reinstall"):
        gemma3.join(parts, tmp_path / "whole")
    monkeypatch.setattr(gemma3, "SHA256", gemma3.sha256(b"part0part1").hexdigest())
    gemma3.join(parts, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"part0part1"


def test_the_package_that_reads_the_file_is_missed_by_name(monkeypatch):
    monkeypatch.setattr(gemma3, "wheel_file", lambda *_: None)
    monkeypatch.setattr(gemma3, "find_spec", lambda _: None)
    with pytest.raises(ModelNotFoundError, match=f"package gguf, which is not installed: {gemma3.INSTALL}"):
        gemma3.find_gguf()


def test_a_conversion_says_once_whose_terms_hold(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path))
    monkeypatch.setattr(gemma3, "find_gguf", lambda: [])
    monkeypatch.setattr(gemma3, "join", lambda parts, whole: whole.write_bytes(b""))
    monkeypatch.setattr(gemma3, "convert", lambda gguf, out: (out / "config.json").write_text("{}"))
    for _ in range(2):
        gemma3.model_path()
    (said,) = caplog.messages
    assert gemma3.TERMS in said


# The real model


@pytest.mark.slow
def test_perplexity_is_low_and_only_with_the_token_that_begins_a_text(gemma):
    model, tokenizer = gemma
    text = "\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    tokens = tokenizer.encode(text[:8000])[:96]
    assert tokens[0] == 2

    def perplexity(tokens, targets):
        logits = model(mx.array([tokens]))[0, -len(targets) :]
        return math.exp(nn.losses.cross_entropy(logits, mx.array(targets), reduction="mean").item())

    assert 15 < perplexity(tokens[:-1], tokens[1:]) < 23
    assert perplexity(tokens[1:47], tokens[2:48]) > 80
    assert model.stored_dtype == "bfloat16"


@pytest.mark.slow
def test_the_converted_folder_is_what_todays_code_would_write(gemma):
    model, tokenizer = gemma
    stored = json.loads((gemma3.converted(gemma3.NAME) / "config.json").read_text())
    assert stored["eos_token_id"] == sorted(tokenizer.eos_token_ids) == [1, 106]
    assert {key: stored[key] for key in gemma3._KNOWN} == gemma3._KNOWN
    assert tokenizer.chat_template == gemma3._CHAT_TEMPLATE
    assert tokenizer.encode("Hello world\n\n  <end_of_turn>") == [2, 9259, 1902, 108, 138, 106]
    assert tokenizer.decode(tokenizer.encode("naïve 你好 🙂\t\x00", add_special_tokens=False)) == "naïve 你好 🙂\t\x00"
    assert [type(layer).__name__ for layer in model.make_cache()[:6]] == [*["RotatingKVCache"] * 5, "KVCache"]

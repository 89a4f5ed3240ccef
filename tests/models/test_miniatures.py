import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import run
from mlx.utils import tree_flatten

from benchmarks import texts
from benchmarks.schema import RESULTS
from mlxkv import lm
from mlxkv.bundled import miniatures
from mlxkv.errors import ModelNotFoundError
from mlxkv.models import cache_spec
from mlxkv.spec import Layer, Rope, Slot

TRAINED = ["miniature/glm", "miniature/gpt2", "miniature/lfm2", "miniature/qwen3"]
ROPE = Rope(64, base=1e6, traditional=False)
PAIR = Layer(Slot("keys", 2, 64, ROPE), Slot("values", 2, 64))
LATENT = Layer(Slot("latent", 1, 128), Slot("k_pe", 1, 32, Rope(32, base=1e6, traditional=True)), latent=True)
LAYERS = {
    "miniature/glm": (LATENT,) * 5,
    "miniature/gpt2": (Layer(Slot("keys", 3, 64), Slot("values", 3, 64)),) * 5,
    "miniature/lfm2": (None, PAIR) * 3,
    "miniature/qwen3": (PAIR,) * 6,
}
VOCABULARY = 257  # bytes and the end of a text


@pytest.fixture(scope="module", params=TRAINED)
def miniature(request):
    return request.param, *lm.load(request.param)


def test_a_checkout_holds_these():
    assert miniatures.names() == TRAINED
    result = json.loads((RESULTS / "miniatures.json").read_text())
    assert [miniatures.PREFIX + row["model"] for row in result["summary"]] == TRAINED


def test_all_checkpoints_together_stay_under_21_mb():
    assert sum(file.stat().st_size for file in miniatures.FOLDER.rglob("*") if file.is_file()) < 21e6


def test_weights_are_stored_in_float16_and_two_to_five_million(miniature):
    _, model, _ = miniature
    assert model.stored_dtype == "float16"
    assert 2e6 < sum(value.size for _, value in tree_flatten(model.parameters())) < 5e6


@pytest.mark.parametrize("name", LAYERS)
def test_its_cache_is_the_architectures(name):
    model, _ = lm.load(name)
    assert cache_spec(model).layers == LAYERS[name]


@pytest.fixture(scope="module")
def pairs():
    """How often each token follows each other token in what the miniatures have read `[VOCABULARY, VOCABULARY]`."""
    kinds = texts.documentation(held_out=False), [texts.code(name) for name in texts.modules(held_out=False)]
    streams = [texts.join_bytes(documents).astype(np.int64) for documents in kinds]
    counts = [np.bincount(VOCABULARY * x[:-1] + x[1:], minlength=VOCABULARY**2) / len(x) for x in streams]
    return 1e6 * np.sum(counts, axis=0).reshape(VOCABULARY, VOCABULARY)


def counted_bits(pairs, rows):
    """Mean bits that models of counted tokens, and of counted pairs, need for each token but the first of rows `[N, T]`."""
    singles = pairs.sum(0) + 1
    single = singles / singles.sum()
    smooth = pairs + 0.1 * VOCABULARY * single  # a token that never followed counts a tenth of its own frequency
    pair = (smooth / smooth.sum(1, keepdims=True))[rows[:, :-1], rows[:, 1:]]
    return -np.log2(single[rows[:, 1:]]).mean(), -np.log2(pair).mean()


def test_it_models_held_out_text_far_better_than_pairs_of_bytes(miniature, pairs):
    _, model, _ = miniature
    kinds = texts.held_out_of_miniatures()
    rows = np.array(
        [texts.spread(texts.join_bytes(kinds[kind]).tolist(), 513, 1)[0] for kind in ("documentation", "code")]
    )
    losses = [nn.losses.cross_entropy(model(row[None, :-1]), row[None, 1:]).mean() for row in mx.array(rows)]
    bits = mx.stack(losses).mean().item() / np.log(2)
    unigram, bigram = counted_bits(pairs, rows)
    assert bits < 0.8 * bigram < 0.8 * unigram


def test_a_token_is_a_byte(miniature):
    _, _, tokenizer = miniature
    text = "".join(map(chr, range(0x180))) + "naïve\r\n\t 日本語 \U0001f600" + "\x00"
    tokens = tokenizer.encode(text)
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == texts.END


def test_every_byte_has_a_token_even_those_no_text_contains(miniature):
    _, _, tokenizer = miniature
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))


def test_no_line_that_is_held_out_of_calibration_or_training_is_in_what_was_read():
    held, read = (
        {line for text in texts.documentation(held_out=held_out) for line in texts.long_lines(text)}
        for held_out in (True, False)
    )
    assert len(held) > 1000
    assert not held & read
    assert not set(texts.modules(held_out=True)) & set(texts.modules(held_out=False))
    assert {"heapq", "statistics"} <= set(texts.modules(held_out=True))


def test_an_unknown_miniature_is_refused_with_those_there_are():
    with pytest.raises(ModelNotFoundError, match="miniature/lfm2, miniature/qwen3"):
        lm.load("miniature/llama")


def test_without_checkpoints_the_error_says_how_to_train(tmp_path, monkeypatch):
    monkeypatch.setattr(miniatures, "FOLDER", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"python -m benchmarks\.miniature_training"):
        lm.load("miniature/qwen3")


def test_the_command_line_takes_a_miniature(tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The import statement combines two operations; it searches for the named module.")
    assert run("dump", "--model", "miniature/lfm2", "--prompt-file", prompt, "--out", tmp_path / "a.npz") == 0
    assert (tmp_path / "a.npz").stat().st_size > 0

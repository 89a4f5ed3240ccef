import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import run

from benchmarks import miniature_texts as texts
from benchmarks import miniature_training as trainer
from benchmarks.miniatures import bits_per_byte, section
from benchmarks.schema import RESULTS
from mlxkv import lm
from mlxkv.bundled import miniatures
from mlxkv.errors import InputError, ModelNotFoundError
from mlxkv.models import cache_spec
from mlxkv.spec import Rope, Slot

TRAINED = ["miniature/glm", "miniature/gpt2", "miniature/lfm2", "miniature/qwen3"]
ROPE = Rope(64, base=1e6, traditional=False)
PAIR = (Slot("keys", 2, 64, ROPE), Slot("values", 2, 64))
LATENT = (Slot("latent", 1, 128), Slot("k_pe", 1, 32, Rope(32, base=1e6, traditional=True)))
LAYERS = {
    "miniature/glm": (LATENT,) * 5,
    "miniature/gpt2": ((Slot("keys", 3, 64), Slot("values", 3, 64)),) * 5,
    "miniature/lfm2": (None, PAIR) * 3,
    "miniature/qwen3": (PAIR,) * 6,
}
RESULT = json.loads((RESULTS / "miniatures.json").read_text())
TINY_TRAINING = trainer.Training(steps=8, tokens=512, contexts=(128,), warmup=2)


@pytest.fixture(scope="module", params=TRAINED)
def miniature(request):
    return request.param, *lm.load(request.param)


def test_a_checkout_holds_these():
    assert miniatures.names() == TRAINED
    assert [miniatures.PREFIX + row["model"] for row in RESULT["summary"]] == TRAINED


def test_all_checkpoints_together_stay_under_21_mb():
    assert sum(file.stat().st_size for file in miniatures.FOLDER.rglob("*") if file.is_file()) < 21e6


def test_weights_are_stored_in_float16_and_two_to_five_million(miniature):
    _, model, _ = miniature
    assert model.stored_dtype == "float16"
    assert 2e6 < sum(value.size for value in trainer.parameters(model).values()) < 5e6


@pytest.mark.parametrize("name", LAYERS)
def test_its_cache_is_the_architectures(name):
    model = trainer.build(trainer.config_of(name.removeprefix(miniatures.PREFIX)), seed=0)
    assert cache_spec(model).layers == LAYERS[name]


def test_it_models_held_out_text_far_better_than_pairs_of_bytes(miniature):
    _, model, _ = miniature
    rows = np.concatenate([texts.windows(512, 1)[kind] for kind in ("documentation", "code")])
    bits = bits_per_byte(model, rows).mean()
    assert bits < 0.8 * texts.bigram_bits(rows).mean() < 0.8 * texts.unigram_bits(rows).mean()


@pytest.mark.parametrize("kind", ["documentation", "code", "other"])
def test_the_recorded_bits_per_byte_beat_the_counted_models_on_every_kind_of_held_out_text(kind):
    for row in [sample for sample in RESULT["samples"] if sample["text"] == kind]:
        # GPT-2 learns every position by itself, and late ones were seldom trained.
        bits = row["bits_per_byte_from_0" if row["model"] == "gpt2" else "bits_per_byte"]
        assert bits < 0.9 * row["bigram"] < 0.9 * row["unigram"], row["model"]


def test_the_section_says_who_is_no_better_than_pairs_and_who_looks_back():
    assert "Worse than counting pairs of bytes: none." in section(RESULT)
    assert "by more than 10.0 %: none." in section(RESULT)
    result = json.loads(json.dumps(RESULT))
    result["summary"][1]["code"]["bits_per_byte"] = 9
    for row in result["samples"]:
        if (row["model"], row["text"]) == ("lfm2", "repeated documentation"):
            row["bits_per_byte_again"] = 0.8 * row["bits_per_byte_first"]
    assert "pairs of bytes: `gpt2` on code." in section(result)
    assert "by more than 10.0 %: `lfm2`." in section(result)


def test_a_token_is_a_byte(miniature):
    _, _, tokenizer = miniature
    text = "".join(map(chr, range(0x180))) + "naïve\r\n\t 日本語 \U0001f600" + "\x00"
    tokens = tokenizer.encode(text)
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.eos_token_id == texts.END


def test_every_byte_has_a_token_even_those_no_text_contains():
    vocabulary = texts.tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(texts.VOCABULARY))


def test_training_reads_no_line_that_is_held_out():
    held = {line for kind in texts.held_out().values() for text in kind for line in texts.texts.long_lines(text)}
    read = {line for kind in texts.training_texts().values() for text in kind for line in texts.texts.long_lines(text)}
    assert len(held) > 5000
    assert not held & read


def test_windows_differ_from_the_text_only_by_copies_of_earlier_bytes():
    stream = np.arange(100_000, dtype=np.int32)
    rows = np.array(texts.batch((stream,), 50, 256, np.random.default_rng(0)))
    assert rows.shape == (50, 257)
    steps = np.diff(rows, axis=1)
    copied = (rows - rows[:, :1] < np.arange(257)).mean()
    assert 0.02 < copied < 0.2
    assert set(rows[steps.max(1) == 1].flatten()) <= set(stream.tolist())


def test_a_short_training_lowers_the_loss_and_repeats_exactly():
    _, record = trainer.train("lfm2", TINY_TRAINING)
    bits = record["bits_per_byte_by_step"]
    assert np.mean(bits[-3:]) < np.mean(bits[:3]) - 0.5
    assert trainer.train("lfm2", TINY_TRAINING)[1]["bits_per_byte_by_step"] == bits


def test_a_trained_model_survives_saving_and_loading(tmp_path):
    model, record = trainer.train("glm", TINY_TRAINING)
    trainer.save(model, trainer.config_of("glm"), record, tmp_path / "glm")
    loaded, _ = lm.load(str(tmp_path / "glm"))
    rows = mx.arange(64)[None]
    assert mx.allclose(loaded(rows), model(rows), atol=0.05)
    assert json.loads((tmp_path / "glm" / "training.json").read_text())["steps"] == TINY_TRAINING.steps


def test_halves_of_a_batch_give_the_gradient_of_the_whole():
    model = trainer.build(trainer.config_of("qwen3"), seed=0)
    rows = mx.random.randint(0, 256, (4, 33))
    loss, gradients = trainer.split_gradient(model)(rows)
    whole, expected = trainer.nn.value_and_grad(model, lambda batch: trainer.mean_loss(model, batch))(rows)
    assert mx.allclose(loss, whole, rtol=1e-5)
    for name, value in trainer.tree_flatten(expected):
        assert mx.allclose(dict(trainer.tree_flatten(gradients))[name], value, atol=1e-5), name


@pytest.mark.parametrize("name", ["lfm2", "glm"])
def test_balancing_favours_the_expert_that_was_chosen_least(name):
    model = trainer.build(trainer.config_of(name), seed=0)
    model(mx.random.randint(0, 256, (2, 64)))
    block = trainer.expert_blocks(model)[0]
    chosen = np.array(block.switch_mlp._chosen)
    assert chosen.sum() == 2 * 64 * 2  # two experts a token
    trainer.balance(model)
    owner, bias = trainer.router_bias(block)
    change = np.array(owner[bias])
    assert change[chosen.argmin()] > 0 > change[chosen.argmax()]


@pytest.mark.parametrize("wrong", [{"contexts": ()}, {"contexts": (64,)}, {"contexts": (4096,)}, {"warmup": 450}])
def test_impossible_trainings_are_refused(wrong):
    with pytest.raises(InputError):
        trainer.Training(**wrong)


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

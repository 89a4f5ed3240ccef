"""Fidelity and perplexity: nothing changed is nothing noticed, and what is damaged more is noticed more."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from damage import shuffled, zeroed

from benchmarks import texts
from mlxkv import CacheCodec, lm, make_cache, read_dump, write_dump
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.errors import InputError
from mlxkv.evaluate import texts as eval_texts
from mlxkv.evaluate.evaluation import evaluations
from mlxkv.evaluate.runner import run
from mlxkv.evaluate.tasks import fidelity, perplexity
from mlxkv.evaluate.variants import baseline, codec_variant, coding_errors, live_variant


class Numbers:
    """A tokenizer of numbers."""

    def encode(self, text):
        return [int(word) for word in text.split()]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(map(str, tiny_tokens(400))))
    return path


@pytest.fixture
def codec(tiny, tmp_path):
    write_dump(tmp_path / "c.npz", lm.dump(tiny, tiny_tokens(300, seed=2)))
    return CacheCodec(calibrate([tmp_path / "c.npz"], KVTCConfig(4)), recent=16)


def test_a_cache_that_keeps_everything_changes_nothing(tiny, codec):
    everything = CacheCodec(codec.artifacts, recent=1000)
    compared = [baseline(), live_variant("full"), codec_variant(everything, "raw")]
    for record in fidelity.evaluate(tiny, compared, tiny_tokens(140), 100):
        assert record["kl"] == pytest.approx(0, abs=1e-5)
        assert record["top1_agreement"] == 1
        assert record["perplexity_delta"] == pytest.approx(0, abs=1e-2)
    assert record["ratio_middle"] is None


def test_a_coded_cache_is_noticed_a_little_and_a_damaged_one_a_lot(tiny, codec):
    compared = [baseline(), codec_variant(codec, "kvtc"), zeroed(), shuffled()]
    _, ours, *damaged = fidelity.evaluate(tiny, compared, tiny_tokens(140), 100)
    assert all(0 < ours["kl"] < record["kl"] for record in damaged)


def test_sizes_add_up_to_the_whole_file(tiny, codec):
    _, record = fidelity.evaluate(tiny, [baseline(), codec_variant(codec, "kvtc")], tiny_tokens(140), 100)
    parts = ("coded_bytes", "sink_and_window_bytes", "other_bytes", "header_bytes")
    assert sum(record[part] for part in parts) == record["file_bytes"] == record["cache_bytes"]
    assert record["ratio"] == record["fp16_bytes"] / record["file_bytes"]


def test_fewer_bits_and_fewer_tokens_are_noticed_more():
    names = ["int8", "int4", "kivi-2"]
    windows = [live_variant("sliding-window", recent=window) for window in (250, 20)]
    compared = [baseline(), *map(live_variant, names), *windows]
    records = fidelity.evaluate(tiny_model("llama"), compared, tiny_tokens(330), 300, chunk=1)
    _, int8, int4, kivi, wide, narrow = (record["kl"] for record in records)
    assert 0 < int8 < int4 < kivi
    assert 0 < wide < narrow


def test_what_follows_goes_in_by_chunks():
    model, tokens = tiny_model("llama"), tiny_tokens(130)
    cache = make_cache(model, "sliding-window", recent=5)
    lm.prefill(model, tokens[:100], cache)
    # In one chunk they would see each other as they are, whatever the method does to them.
    apart = mx.concatenate([model(mx.array([[token]]), cache=cache)[0] for token in tokens[100:-1]])
    exact = model(mx.array([tokens]))[0, 100:-1]
    compared = [baseline(), live_variant("sliding-window", recent=5)]
    single, many = (fidelity.evaluate(model, compared, tokens, 100, chunk)[1]["kl"] for chunk in (1, 16))
    assert single == pytest.approx(fidelity.compare(exact, apart, tokens[100:])["kl"], rel=1e-4)
    logits = np.array(exact, np.float64)
    losses = np.logaddexp.reduce(logits, axis=-1) - logits[range(29), tokens[101:]]
    reference = fidelity.evaluate(model, compared, tokens, 100)[1]["perplexity_reference"]
    assert reference == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert single != pytest.approx(many, rel=0.01)


def test_perplexity_is_that_of_one_pass_over_the_text(text_file):
    model = tiny_model("llama")
    options = perplexity.PerplexityOptions(text_file, context_tokens=60, eval_tokens=40, samples=1, chunk=7)
    compared = [live_variant("full"), live_variant("int8"), zeroed(), shuffled()]
    exact, full, int8, *damaged = run("perplexity", model, Numbers(), compared, options)["samples"]
    tokens = Numbers().encode(text_file.read_text())[exact["start"] :][:101]
    logits = np.array(model(mx.array([tokens]))[0, 60:-1], np.float64)
    losses = np.logaddexp.reduce(logits, axis=-1) - logits[range(40), tokens[61:]]
    assert exact["perplexity"] == pytest.approx(np.exp(losses.mean()), rel=1e-4)
    assert exact["bits_per_token"] == pytest.approx(losses.mean() / np.log(2), rel=1e-4)
    assert full["perplexity_delta"] == pytest.approx(0, abs=1e-2 * exact["perplexity"])
    assert exact["verdict"] == "excellent"
    for broken in damaged:
        assert abs(int8["perplexity_delta"]) < abs(broken["perplexity_delta"])


def test_stretches_are_drawn_by_seed_and_spread_over_the_text(text_file):
    tokens = Numbers().encode(text_file.read_text())
    drawn = eval_texts.draw_excerpts(Numbers(), text_file, 50, 4, 0)
    assert (
        drawn
        == eval_texts.draw_excerpts(Numbers(), text_file, 50, 4, 0)
        != eval_texts.draw_excerpts(Numbers(), text_file, 50, 4, 1)
    )
    assert [start * 4 // 350 for start in drawn] == [0, 1, 2, 3]
    assert all(tokens[start : start + 50] == part for start, part in drawn.items())
    assert list(eval_texts.draw_excerpts(Numbers(), text_file, 400, 3, 0)) == [0]


def test_a_short_text_is_refused_with_the_numbers(text_file):
    with pytest.raises(InputError, match=r"numbers\.txt has 400 tokens and 411 are needed"):
        fidelity.Fidelity(fidelity.FidelityOptions(text_file, context_tokens=390, eval_tokens=20)).samples(Numbers(), 0)
    with pytest.raises(InputError, match="10 tokens are too few to hold 9"):
        fidelity.evaluate(None, [], tiny_tokens(10), 9)
    for options_class in (fidelity.FidelityOptions, perplexity.PerplexityOptions):
        with pytest.raises(InputError, match="eval_tokens must be 1 or more, not 0"):
            options_class(eval_tokens=0)


def test_calibration_never_reads_a_line_that_is_held_out():
    read, held = (
        {line for text in texts.documentation(held_out=h) for line in texts.long_lines(text)} for h in (False, True)
    )
    assert len(read) > 3000
    assert len(held) > 1000
    assert not read & held


def test_smollm2_hardly_notices_and_would_notice_a_wrong_rotation(smollm2, tmp_path):
    import pydoc_data.topics

    model, tokenizer = smollm2
    tokens = tokenizer.encode("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
    for index in range(2):
        write_dump(tmp_path / f"{index}.npz", lm.dump(model, tokens[9000 * index :][:160], dtype="float16"))
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    held_out = tokens[40_000:40_181]
    ours = codec_variant(CacheCodec(calibrate(files, KVTCConfig(8, rank=128))), "kvtc-8", "float16")
    record = fidelity.evaluate(model, [baseline(), ours], held_out, 160)[1]
    assert record["kl"] < 0.1
    assert record["ratio_middle"] > 8
    # The reference implementation pairs neighbouring dimensions: the error of keys shows it.
    dump = lm.dump(model, held_out[:160], dtype="float16")
    wrong = dataclasses.replace(dump.spec, layers=tuple(swapped(layer) for layer in dump.spec.layers))
    for file in files:
        write_dump(file, dataclasses.replace(read_dump(file), spec=wrong))
    dump.spec = wrong
    codec = CacheCodec(calibrate(files, KVTCConfig(8, rank=128)))
    decoded = codec.decompress_dump(codec.compress_dump(dump))
    sizes = {"sinks": 4, "recent": 128, "tokens": 160}
    assert coding_errors(sizes, dump, decoded)["k_relative_error"] > 1.5 * record["k_relative_error"]


def swapped(layer):
    keys, values = layer
    rope = dataclasses.replace(keys.rope, traditional=True)
    return dataclasses.replace(keys, rope=rope), values


def test_every_number_of_a_comparison_is_worse_where_the_first_prediction_is():
    right = mx.array(5 * np.eye(4, dtype=np.float32)[1:])
    wrong = mx.concatenate([mx.array([[2.0, 0, 0, 0]]), right[1:]])
    found = fidelity.compare(right, wrong, [0, 1, 2, 3])
    p, q = (np.exp(x) / np.exp(x).sum() for x in np.array([[0, 5.0, 0, 0], [2.0, 0, 0, 0]]))
    assert found["next_token_cosine"] == 0
    assert found["next_token_kl"] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    assert found["kl"] == pytest.approx(found["next_token_kl"] / 3)
    assert found["top1_agreement"] == pytest.approx(2 / 3)
    assert 0 < found["perplexity_delta"] == found["perplexity"] - found["perplexity_reference"]


@pytest.mark.parametrize("name", ["fidelity", "perplexity"])
def test_what_the_options_say_is_what_is_held_and_fed(text_file, name):
    model, way = tiny_model("llama"), live_variant("sliding-window", recent=5)
    options = evaluations.get(name).options_class(text_file, 60, 20, samples=1, chunk=1)
    found = run(name, model, Numbers(), [way], options)["samples"][1]
    tokens = Numbers().encode(text_file.read_text())[found["start"] :][:81]
    expected = fidelity.evaluate(model, [baseline(), way], tokens, 60, chunk=1)[1]
    for score in ("tokens", "predicted_tokens", "perplexity", "perplexity_delta"):
        assert found[score] == pytest.approx(expected[score], rel=1e-4), score


def test_a_damaged_cache_is_noticed_in_perplexity_and_int8_is_not(smollm2):
    options = perplexity.PerplexityOptions(context_tokens=64, eval_tokens=16, samples=1)
    rows = run("perplexity", *smollm2, [live_variant("full"), live_variant("int8"), zeroed(), shuffled()], options)[
        "samples"
    ]
    assert [row["verdict"] for row in rows] == ["excellent"] * 3 + ["noticed"] * 2
    assert min(row["perplexity_delta"] for row in rows[3:]) > 1


def test_every_seed_has_stretches_of_its_own(text_file):
    options = perplexity.PerplexityOptions(text_file, context_tokens=20, eval_tokens=10)
    first, second = (
        {unit.key["start"] for unit in perplexity.Perplexity(options).samples(Numbers(), seed)} for seed in (0, 1)
    )
    assert not first & second

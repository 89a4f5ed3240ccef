import dataclasses

import numpy as np
import pytest
from conftest import tiny_tokens

from benchmarks import texts
from mlxkv import KVTCCacheCodec, lm, read_dump, write_dump
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.kvtc import Settings
from mlxkv.errors import InputError
from mlxkv.evaluate import fidelity


@pytest.fixture
def codec(tiny, tmp_path):
    write_dump(tmp_path / "c.npz", lm.dump(tiny, tiny_tokens(300, seed=2)))
    return KVTCCacheCodec(calibrate([tmp_path / "c.npz"], Settings(4)), w=16)


def test_a_cache_kept_raw_changes_nothing(tiny, codec):
    everything = KVTCCacheCodec(codec.artifacts, w=1000)
    record = fidelity.evaluate(tiny, everything, fidelity.prefix(tiny, tiny_tokens(140), 100, predict=30))
    assert record["kl"] == pytest.approx(0, abs=1e-6)
    assert record["top1_agreement"] == 1
    assert record["perplexity_delta"] == pytest.approx(0, abs=1e-4)
    assert record["ratio_middle"] is None


def test_a_coded_cache_is_noticed_a_little_and_a_damaged_one_a_lot(tiny, codec):
    start = fidelity.prefix(tiny, tiny_tokens(140), 100, predict=30)
    record = fidelity.evaluate(tiny, codec, start)
    shrunk = dataclasses.replace(start.dump, k=start.dump.k * np.float32(0.3))
    logits = fidelity.continue_with(tiny, lm.restore(tiny, shrunk), start.following)
    assert 0 < record["kl"] < fidelity.compare(start.logits, logits, start.following)["kl"]


def test_the_live_cache_is_not_used_up(tiny):
    start = fidelity.prefix(tiny, tiny_tokens(60), 40, predict=10)
    again = fidelity.continue_with(tiny, start.cache, start.following)
    assert np.array_equal(np.array(again), np.array(start.logits))


def test_sizes_add_up_to_the_whole_file(tiny, codec):
    start = fidelity.prefix(tiny, tiny_tokens(140), 100, predict=30)
    record = fidelity.evaluate(tiny, codec, start)
    parts = ("coded_bytes", "sink_and_window_bytes", "other_bytes", "header_bytes")
    assert sum(record[part] for part in parts) == record["file_bytes"] == len(codec.compress_dump(start.dump))
    assert record["ratio"] == start.dump.fp16_bytes / record["file_bytes"]


def test_calibration_never_reads_a_line_that_is_held_out():
    read, held = (
        {line for text in texts.documentation(held_out=h) for line in texts.long_lines(text)} for h in (False, True)
    )
    assert len(read) > 3000
    assert len(held) > 1000
    assert not read & held


def test_a_short_text_is_refused_with_the_numbers(tiny):
    with pytest.raises(InputError, match=r"50 tokens; 40 \+ 10 \+ 1"):
        fidelity.prefix(tiny, tiny_tokens(50), 40, predict=10)


def test_smollm2_hardly_notices_and_would_notice_a_wrong_rotation(smollm2, tmp_path):
    import pydoc_data.topics

    model, tokenizer = smollm2
    tokens = tokenizer.encode("\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())))
    for index in range(2):
        write_dump(tmp_path / f"{index}.npz", lm.dump(model, tokens[9000 * index :][:512], dtype="float16"))
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    start = fidelity.prefix(model, tokens[40_000:40_600], 400, predict=100, dtype="float16")
    record = fidelity.evaluate(model, KVTCCacheCodec(calibrate(files, Settings(8, rank=256))), start)
    assert record["kl"] < 0.15
    assert record["ratio_middle"] > 8
    # The reference implementation pairs neighbouring dimensions: the error of keys shows it.
    wrong = dataclasses.replace(start.dump.spec, layers=tuple(swapped(layer) for layer in start.dump.spec.layers))
    for file in files:
        write_dump(file, dataclasses.replace(read_dump(file), spec=wrong))
    start.dump.spec = wrong
    codec = KVTCCacheCodec(calibrate(files, Settings(8, rank=256)))
    decoded = codec.decompress_dump(codec.compress_dump(start.dump))
    sizes = {"s": 4, "w": 128, "tokens": 400}
    assert fidelity.errors(sizes, start.dump, decoded)["k_relative_error"] > 1.5 * record["k_relative_error"]


def swapped(layer):
    keys, values = layer
    rope = dataclasses.replace(keys.rope, traditional=True)
    return dataclasses.replace(keys, rope=rope), values

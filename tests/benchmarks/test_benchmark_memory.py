"""Peak memory: a prompt is read into each cache as mlx-lm reads it, and the report has both halves."""

from benchmarks.experiments import memory

CODED = [
    {"step": step, "seconds": 1.0, "peak_bytes": 4 * 10**9, "mlx_peak_bytes": 0, "peak_over_fp16": ratio}
    for step, ratio in (("baseline", 0.1), ("compress", 1.5), ("decompress", 1.1))
]
CONFIG = {"tokens": 32768, "fp16_bytes": 3 * 10**9, "chunk": 2048}


def test_a_prompt_is_read_in_chunks_and_its_peak_is_above_the_weights(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 64)
    rows = {cache: memory.read(cache, 200, 2, "miniature/qwen3") for cache in ("KVCache", "--kv-bits 4", "int4")}
    held = {name: row["held_bytes"] for name, row in rows.items()}
    assert held["KVCache"] > 4 * held["--kv-bits 4"]  # which is quantized from the first token on
    assert held["KVCache"] > 2 * held["int4"]
    for row in rows.values():
        assert row["held_bytes"] < row["peak_bytes"] < 5 * 10**6  # the weights are 10 MB


def test_the_report_has_both_halves_once_both_were_measured():
    said = memory.section({"config": CONFIG, "summary": CODED})
    assert said.startswith(
        "At 32,768 tokens, 3000.0 MB of fp16 cache, the peak is 1.50 times the cache to compress and 1.10"
    )
    assert "Reading" not in said
    read = [
        {"cache": cache, "length": length, "layers": 2, "peak_bytes": peak * 10**6 * length // 1000, "held_bytes": 10**6, "seconds": 2.0}
        for length in (1000, 4000)
        for cache, peak in (("KVCache", 400), ("int4", 300))
    ]  # fmt: skip
    result = {"config": CONFIG, "summary": [*CODED, *read]}
    assert memory.brief(result).endswith(
        "Reading 4,000 tokens takes 1600.0 MB with `KVCache`, 1200.0 MB with `int4` at most, beside the weights of 2 layers."
    )
    assert "| `int4` | 1,000 | 2 | 300.0 MB | 0.75 | 1.0 MB | 2.0 |" in memory.section(result)

"""Tokens a second: every cache decodes the same tokens in turn, and speeds are against the caches that keep all."""

from conftest import tiny_model

from benchmarks import recorded
from benchmarks.experiments import decode_speed

TOKENS = [(7 * place) % 97 for place in range(90)]


def test_every_cache_takes_the_text_in_and_decodes_what_follows(monkeypatch):
    monkeypatch.setattr(decode_speed, "ROUNDS", 2)
    model = tiny_model("llama", head_dim=64)
    recording = recorded.record(model, TOKENS[:80], 40)
    for answered in (True, False):
        caches, seconds = decode_speed.taken_in(model, ("full", "int8"), recording, answered)
        assert list(caches) == [*decode_speed.THEIRS, "full", "int8"]
        assert {cache[0].offset for cache in caches.values()} == {80}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in seconds.values())
    decoded = decode_speed.decoding(model, caches, TOKENS[80:])
    assert {len(times) for times in decoded.values()} == {10 - decode_speed.WARM_UP}
    assert {cache[0].offset for cache in caches.values()} == {90}


def sample(length, cache, factor, answered):
    return {"length": length, "cache": cache, "cache_bytes": 4 * 10**6, "stored": [0.3, 0.2 * factor, 0.1], "answered": answered,
            "seconds": [0.05 * factor, 0.05 * factor, 0.08 * factor]}  # fmt: skip


def test_the_report_has_speeds_of_all_tokens_and_of_the_usual_one():
    samples = [
        sample(length, cache, factor, [1.0, 2.0] if length == 1000 else None)
        for length in (1000, 4000)
        for cache, factor in (("KVCache", 1.0), ("full", 2.0), ("int8", 1.25))
    ]
    config = {"model": "smollm2-135m", "chunk": 2048, "cores": 2, "load_average": 0.1}
    result = {"config": config, "summary": decode_speed.summarise(samples)}
    assert decode_speed.brief(result).endswith(
        "with 1,000 tokens held 1.60 (`int8`); with 4,000 tokens held 1.60 (`int8`)."
    )
    said = decode_speed.section(result)
    row = "| `int8` | 4.0 MB | 13.3 | 1.60 | 0.80 | 62.5 | 62.5 to 81.2 | 1.60 |"
    assert f"{row} 0.25 | 1.50 |" in said
    assert f"{row} 0.06 |  |" in said

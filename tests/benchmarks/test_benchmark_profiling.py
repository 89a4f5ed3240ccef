"""What a live method costs: rounds are paired, and the words follow from the numbers."""

import pytest

from benchmarks.experiments import profiling


def samples():
    """h2o-512 is half as fast as the untouched cache in two of three rounds, smartkv-0.5 twice as fast."""
    found = []
    for name, factor in {"whole": 1, "h2o-512": 2, "smartkv-0.5": 0.5}.items():
        sizes = dict.fromkeys(("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes"), 4e6)
        found += [
            {"measured": "memory", "variant": name, "resident_bytes": 1e6 * factor, **sizes},
            {"measured": "latency", "variant": name, "seconds": [[0.08 * factor], [0.08], [0.08 * factor]],
             **dict.fromkeys(("prefill_seconds", "token_seconds", "slowest_token_seconds", "prefill_relative"), 1),
             "decode_relative": 1 / factor},
        ]  # fmt: skip
    return found


def test_the_summary_pairs_rounds():
    _, h2o, smartkv = profiling.summarise(samples())
    assert h2o["decode_relative_rounds"] == [0.5, 1]
    assert smartkv["decode_relative_rounds"] == pytest.approx([1, 2])
    assert (h2o["resident_bytes"], h2o["decode_peak_bytes"]) == (2e6, 4e6)


def test_the_section_is_made_from_the_numbers():
    text = profiling.section({"summary": profiling.summarise(samples()), "config": {"context": 1024}})
    assert "decoding runs at 0.50 (h2o-512) to 2.00 (smartkv-0.5) of the speed; faster in every round: none." in text
    assert "| h2o-512 | 2.0 MB | 4.0 MB | 4.0 MB | 1.0 s | 1.00 | 1000 | 1000 | 0.50 | 0.50 to 1.00 |" in text

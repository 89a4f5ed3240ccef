"""What coding windows costs, from samples made up and from a small cache."""

import pytest
from zoo.build import build, tokens

from benchmarks.experiments import windows
from mlxkv import lm


def test_means_are_of_divergence_and_of_bytes():
    samples = [
        {"text": text, "quality": 30, "part": part, "kl": kl, "ratio": ratio, "file_ratio": 10.0}
        for part in windows.PARTS
        for text, kl, ratio in (("code", 0.01, 20.0), ("legal", 0.03, 60.0))
    ]
    (row,) = windows.summarise(samples)
    assert row["both"]["kl"] == pytest.approx(0.02)
    assert row["both"]["ratio"] == pytest.approx(30.0)  # twice the bytes count twice
    said = windows.section({"summary": [row], "config": {"kinds": ["code", "legal"], "length": 1024}})
    assert "0.0100 at 20.0x | 0.0300 at 60.0x" in said


def test_parts_of_a_cache_take_one_group_from_the_file_each():
    exact = lm.dump(build("gemma3_text"), tokens("gemma3_text", 30))
    coded = lm.dump(build("gemma3_text"), tokens("gemma3_text", 30, seed=2))
    full, window, both = windows.parts(exact, coded)
    assert full.k is coded.k
    assert full.others is exact.others
    assert window.k is exact.k
    assert window.others is coded.others
    assert both is coded

"""Disk or computing: by how fast both have been, once that is known."""

import pytest

from mlxkv.serving.speeds import LEAST_GAIN, LEAST_MEASURED, Speeds

SOME = 1000


def speeds(computing=(), reading=(), tokens=SOME):
    """What has been measured, in tokens per second."""
    made = Speeds()
    for rate in computing:
        made.computed(tokens, tokens / rate)
    for rate in reading:
        made.read(tokens, tokens / rate)
    return made


@pytest.mark.parametrize("known", [((), ()), ((9, 9), (1,)), ((1,), (9, 9)), ((9,), (1,))])
@pytest.mark.parametrize(("stored", "kept", "worth"), [
    (64, 0, True), (63, 0, False), (1000, 875, True), (1000, 876, False), (80, 17, False), (64, 64, False), (9, 64, False),
])  # fmt: skip
def test_until_both_speeds_are_known_an_eighth_must_be_saved(known, stored, kept, worth):
    assert speeds(*known).is_worth(stored, kept) == worth


@pytest.mark.parametrize("size", [1, 100, 10**6])
@pytest.mark.parametrize(("reading", "stored", "kept", "worth"), [
    (0.9, 1000, 0, False), (0.9, 10**6, 0, False),  # a small model on a fast device
    (1.1, 1000, 0, True), (1.1, 1000, 900, False), (1.1, LEAST_GAIN - 1, 0, False),
    (100, 1000, 936, True), (100, 1000, 937, False), (100, 10**5, 10**5 - 1100, True), (100, 10**5, 10**5 - 900, False),
])  # fmt: skip
def test_once_both_are_known_what_takes_less_time_is_done(size, reading, stored, kept, worth):
    assert speeds((size, size), (reading * size, reading * size)).is_worth(stored, kept) == worth


def test_the_newest_measurements_count_most_and_small_ones_not_at_all():
    slow_at_first = speeds((1, 100, 100, 100, 100, 100, 100, 100, 100), (50, 50))
    assert not slow_at_first.is_worth(1000, 0)
    slow_at_first.read(LEAST_MEASURED - 1, 1e-9)
    slow_at_first.computed(LEAST_MEASURED - 1, 1e9)
    assert not slow_at_first.is_worth(1000, 0)
    assert slow_at_first.statistics()["computed_tokens_per_second"] > 60
    assert slow_at_first.statistics()["read_tokens_per_second"] == pytest.approx(50, rel=0.1)


def test_a_disk_that_was_slow_once_is_tried_again_some_time():
    measured = speeds((100, 100), (50, 50))
    for _ in range(20):
        assert not measured.is_worth(1000, 0)
    assert any(measured.is_worth(1000, 0) for _ in range(30))


def test_that_memory_has_nearly_all_is_not_held_against_a_disk():
    measured = speeds((100, 100), (200, 200))
    before = measured.statistics()
    assert not any(measured.is_worth(1000, 900) for _ in range(300))
    assert measured.statistics() == before


@pytest.mark.parametrize("tokens", [0, 10**6])
def test_what_took_no_time_tells_nothing(tokens):
    made = Speeds()
    for _ in range(3):
        made.read(tokens, 0.0)
    assert made.statistics()["read_tokens_per_second"] is None

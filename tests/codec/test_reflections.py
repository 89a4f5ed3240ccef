"""Reflections along tokens: an orthogonal transform, however its vectors are rounded, that gathers energy where there is any."""

import mlx.core as mx
import numpy as np
import pytest

from mlxkv.codec.stages import reflections
from mlxkv.errors import FormatError


def rows_with(directions, tokens=120, width=900, seed=0):
    """Noise of one step, and some strong directions that all tokens share."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((tokens, directions)) @ random.standard_normal((directions, width))
    return mx.array((4 * shared + random.standard_normal((tokens, width))).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 2, 3, 120])
@pytest.mark.parametrize("directions", [0, 1, 9])
def test_rows_come_back_and_keep_their_energy(tokens, directions):
    rows = rows_with(directions, tokens)
    vectors = reflections.learn_reflections(rows)
    components = reflections.reflect(vectors, rows)
    np.testing.assert_allclose(np.array(reflections.reflect_back(vectors, components)), np.array(rows), atol=1e-3)
    kept, whole = (np.square(np.array(x, np.float64)).sum() for x in (components, rows))
    assert kept == pytest.approx(whole, rel=1e-5)


def test_what_tokens_share_is_gathered_in_the_first_rows():
    rows = rows_with(9)
    vectors = reflections.learn_reflections(rows)
    assert 9 <= len(vectors) <= 12
    energy = np.square(np.array(reflections.reflect(vectors, rows))).sum(axis=1)
    assert energy[:9].sum() > 0.98 * energy.sum()


def test_noise_has_no_reflections_since_they_would_not_pay():
    assert len(reflections.learn_reflections(rows_with(0))) == 0
    assert len(reflections.learn_reflections(mx.zeros((120, 900)))) == 0


def test_any_stored_bytes_are_orthogonal_reflections():
    random = np.random.default_rng(0)
    for count, tokens in ((1, 1), (3, 3), (5, 40), (128, 200)):
        size = reflections.stored_bytes(count, tokens)
        vectors = reflections.from_bytes(random.integers(0, 256, size, np.uint8).tobytes(), count, tokens)
        assert reflections.from_bytes(reflections.to_bytes(vectors), count, tokens).tobytes() == vectors.tobytes()
        turned = np.array(reflections.reflect(vectors, mx.eye(tokens)))
        np.testing.assert_allclose(turned @ turned.T, np.eye(tokens), atol=1e-4)
    for count, tokens in ((2, 1), (129, 500), (65535, 512)):
        with pytest.raises(FormatError, match="too many"):
            reflections.stored_bytes(count, tokens)

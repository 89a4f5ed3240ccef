"""Sensitivity is what it says: half of e'Fe is the KL divergence that a small error e costs."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm, read_dump, write_dump
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.models import cache_spec
from mlxkv.sensitivity import (
    CONTEXT_TOKENS,
    PREDICTED_TOKENS,
    _counted_tokens,
    _rebuild_cache,
    _stretches,
    sensitivity,
)
from mlxkv.spec import STREAMS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DIFFERENT)
def measured(request):
    """A model, a text, what is held of it, the log-probabilities of what follows, and two F, each of many labels."""
    model, tokens = tiny_model(request.param), tiny_tokens(40)
    dump = lm.dump(model, tokens[:30], dtype="float32")
    found = [sensitivity(model, tokens, seed=seed) for seed in range(160)]
    halves = [
        {name: np.mean([each[name] for each in half], axis=0) for name in STREAMS} for half in (found[::2], found[1::2])
    ]
    return model, tokens, dump, following(model, dump, tokens), *halves


def following(model, dump, tokens):
    logits = model(mx.array([tokens[30:]]), cache=lm.restore(model, dump))[0]
    return np.array(nn.log_softmax(logits.astype(mx.float32)))


@pytest.mark.parametrize("name", STREAMS)
def test_half_the_quadratic_form_is_the_divergence_an_error_costs(measured, name):
    model, tokens, dump, exact, fisher, other = measured
    stream, random, cost = dump.spec.stream(name), np.random.default_rng(0), 3e-5
    counted = _counted_tokens(30)
    assert (counted.start, counted.stop) == (4, 23)
    if stream.width == 0:
        pytest.skip("this model has no such stream")
    for layer in range(stream.layers):
        directions = np.linalg.eigh(fisher[name][layer])[1][..., -1]  # [H, D]: those that matter most
        needed = np.einsum("hd,hde,he->", directions, other[name][layer], directions)
        size = np.sqrt(2 * cost / (len(counted) * needed))
        costs = []
        for _ in range(60):
            signs = random.choice([-1, 1], (1, stream.heads, len(counted), 1))  # tokens' errors are independent
            error = np.zeros((1, stream.heads, 30, stream.dim), np.float32)
            error[:, :, counted] = size * signs * directions[:, None]
            rope, changed = stream.ropes[layer], dump.stream(name).copy()
            changed[layer] += np.array(rope.rotate(mx.array(error))) if rope else error
            found = following(model, replace(dump, **{name: changed}), tokens)
            costs.append((np.exp(exact) * (exact - found)).sum())
        assert np.mean(costs) == pytest.approx(cost, rel=0.4), layer


def test_it_is_symmetric_without_negative_directions_and_the_same_for_the_same_seed(tiny):
    found, again, other = (sensitivity(tiny, tiny_tokens(40), seed=seed) for seed in (0, 0, 1))
    for name in STREAMS:
        assert np.array_equal(found[name], again[name])
        np.testing.assert_allclose(found[name], found[name].swapaxes(-1, -2), atol=1e-9, rtol=1e-4)
        if found[name].size:
            assert np.linalg.eigvalsh(found[name]).min() > -1e-5 * found[name].max()
            assert not np.array_equal(found[name], other[name])


def test_energies_are_the_traces_token_by_token_and_none_where_nothing_counts(tiny):
    found, counted = sensitivity(tiny, tiny_tokens(40)), _counted_tokens(30)
    for name in STREAMS:
        energy = found[f"{name}.energy"]
        assert energy.shape == (*found[name].shape[:2], 40)
        trace = np.trace(found[name], axis1=-2, axis2=-1)
        np.testing.assert_allclose(energy.sum(axis=-1) / len(counted), trace, rtol=1e-4)
        outside = np.delete(energy, np.r_[counted], axis=-1)
        assert not outside.any()
        assert energy.size == 0 or trace.max() == 0 or energy[..., counted].max() > 0


def test_quantized_weights_have_one_too():
    model = tiny_model("llama", intermediate_size=128)
    exact = of_many_labels(model)
    nn.quantize(model, group_size=32, bits=8)
    for name, found in of_many_labels(model).items():
        assert np.corrcoef(found.ravel(), exact[name].ravel())[0, 1] > 0.9


def of_many_labels(model):
    found = [sensitivity(model, tiny_tokens(40), seed=seed) for seed in range(40)]
    return {name: np.mean([each[name] for each in found], axis=0) for name in STREAMS}


def test_a_model_is_the_same_afterwards(tiny):
    tokens = tiny_tokens(40)
    before = lm.dump(tiny, tokens)
    sensitivity(tiny, tokens)
    after = lm.dump(tiny, tokens)
    assert np.array_equal(before.k, after.k)
    assert before.fingerprint == after.fingerprint


def test_a_long_text_is_read_in_whole_stretches_and_its_progress_reported():
    size = CONTEXT_TOKENS + PREDICTED_TOKENS
    assert [len(part) for _, part in _stretches(range(3 * size + 1))] == [size] * 3
    assert [len(part) for _, part in _stretches(range(size - 1))] == [size - 1]
    reported = []
    sensitivity(tiny_model("llama", num_hidden_layers=1), tiny_tokens(2 * size), progress=reported.append)
    assert reported == [size, size]


@pytest.mark.parametrize("begins", [True, False])
def test_every_stretch_begins_as_a_text_of_the_model_does(begins):
    size, bos = CONTEXT_TOKENS + PREDICTED_TOKENS, -1
    tokens = [*([bos] if begins else []), *range(3 * size)]
    found = list(_stretches(tokens, [bos]))
    assert all(part[0] == bos and part.count(bos) == 1 and len(part) == size for _, part in found)
    assert len(found) == 3
    joined = [token for _, part in found for token in part[1:]]
    assert joined == list(range(len(joined)))  # nothing is left out
    for position, part in found:
        assert part[5] == tokens[position + 5]


def test_energies_lie_at_the_tokens_of_the_text_though_stretches_were_given_a_start():
    size, tokens = CONTEXT_TOKENS + PREDICTED_TOKENS, tiny_tokens(2 * (CONTEXT_TOKENS + PREDICTED_TOKENS))
    model = tiny_model("llama", num_hidden_layers=1)
    tokens[0] = 5
    found = sensitivity(model, tokens, start=[5])["k.energy"].sum(axis=(0, 1))
    counted = _counted_tokens(CONTEXT_TOKENS)
    expected = np.r_[np.array(counted), size - 1 + np.array(counted)]
    assert np.array_equal(np.flatnonzero(found), expected)
    alone = sensitivity(model, [5, *tokens[size : 2 * size - 1]], seed=1)["k.energy"].sum(axis=(0, 1))
    np.testing.assert_allclose(found[size - 1 + np.array(counted)], alone[np.array(counted)], rtol=1e-4)


@pytest.mark.parametrize("length", [20, 60])
def test_a_rebuilt_cache_predicts_as_the_one_it_was_made_of_whatever_its_layers_are(length):
    layers = ["sliding_attention", "full_attention"]
    for model in (tiny_model("llama", layer_types=layers, sliding_window=16), tiny_model("lfm2")):
        cache, following = make_prompt_cache(model), mx.array([tiny_tokens(12, seed=3)])
        lm.prefill(model, tiny_tokens(length), cache)
        spec = cache_spec(model)
        pairs = [cache[layer].keys_and_values() for layer in spec.attention_layers]
        rebuilt = [model(following, cache=_rebuild_cache(model, spec, cache, pairs)) for _ in range(2)]
        exact = model(following, cache=cache)
        for found in rebuilt:
            np.testing.assert_allclose(np.array(found), np.array(exact), atol=1e-4)


def test_too_short_a_text_is_refused(tiny):
    sensitivity(tiny, tiny_tokens(16))
    with pytest.raises(InputError, match="at least 16 tokens, the text has 15"):
        sensitivity(tiny, tiny_tokens(15))


def test_a_dump_keeps_it_and_other_shapes_and_values_are_refused(tiny, tmp_path):
    tokens, file = tiny_tokens(40), tmp_path / "a.npz"
    dump = replace(lm.dump(tiny, tokens), sensitivity=sensitivity(tiny, tokens))
    write_dump(file, dump)
    kept = read_dump(file).sensitivity
    assert set(kept) == {"k", "v", "k.energy", "v.energy"}
    assert all(np.array_equal(kept[name], dump.sensitivity[name]) for name in kept)
    with pytest.raises(MismatchError, match="sensitivity of k has shape"):
        replace(dump, sensitivity={**kept, "k": kept["k"][:, :, 1:]})
    with pytest.raises(MismatchError, match="sensitivity of v has shape None"):
        replace(dump, sensitivity={name: kept[name] for name in ("k", "k.energy", "v.energy")})
    with pytest.raises(MismatchError, match=r"sensitivity of v.energy has shape"):
        replace(dump, sensitivity={**kept, "v.energy": kept["v.energy"][:, :, 1:]})
    with pytest.raises(MismatchError, match=r"sensitivity of k.energy has shape"):
        replace(dump, tokens=dump.tokens[:, :30], k=dump.k[..., :30, :], v=dump.v[..., :30, :])
    for bad in ({"k": kept["k"]}, {**kept, "k": kept["k"] * np.float32("nan")}, {**kept, "k": kept["k"] * 1.0j}):
        dump.sensitivity = bad
        write_dump(file, dump)
        with pytest.raises(FormatError, match="sensitivity is not finite float32"):
            read_dump(file)

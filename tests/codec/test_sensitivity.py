"""Sensitivity is what it says: half of e'Fe is the KL divergence that a small error e costs."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DIFFERENT, tiny_model, tiny_tokens
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import build
from zoo.build import tokens as tokens_of

from mlxkv import lm, read_dump, write_dump
from mlxkv.dump import stream_key
from mlxkv.errors import FormatError, InputError, MismatchError
from mlxkv.models import cache_spec
from mlxkv.sensitivity import (
    CONTEXT_TOKENS,
    PREDICTED_TOKENS,
    _counted_tokens,
    _described,
    _perturb,
    _rebuild_cache,
    _stretches,
    _tokens_of,
    dump_with_sensitivity,
    sensitivity,
)
from mlxkv.spec import STREAMS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=DIFFERENT)
def measured(request):
    """A model, a text, what is held of it, the log-probabilities of what follows, and two F, each of many labels."""
    model, tokens = tiny_model(request.param), tiny_tokens(40)
    dump = lm.dump(model, tokens[:30], dtype="float32")
    found = [sensitivity(model, tokens, seed=seed) for seed in range(100)]
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
        for _ in range(24):
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
@pytest.mark.parametrize("name", ["gemma3_text", "lfm2", "deepseek_v32", "llama4", "gpt_oss"])
def test_a_rebuilt_cache_predicts_as_the_one_it_was_made_of_whatever_its_layers_are(name, length):
    model, ids = build(name), tokens_of(name, length + 12)
    cache, following, spec = make_prompt_cache(model), mx.array([ids[length:]]), cache_spec(model)
    lm.prefill(model, ids[:length], cache)
    pairs = {index: _tokens_of(entry) for index, entry in _described(cache, spec)}
    rebuilt = [model(following, cache=_rebuild_cache(model, spec, cache, pairs)) for _ in range(2)]
    exact = model(following, cache=cache)
    for found in rebuilt:
        np.testing.assert_allclose(np.array(found), np.array(exact), atol=1e-4)


@pytest.mark.parametrize(
    "name", ["gemma3_text", "deepseek_v32", "llama4", "gpt_oss", "qwen3_next", "gemma4", "minimax_m3_vl"]
)
def test_every_group_of_layers_has_a_sensitivity(name):
    model, ids = build(name), tokens_of(name, 60)
    found, spec = sensitivity(model, ids), cache_spec(model)
    for number, group in enumerate(spec.groups):
        for name_of in STREAMS:
            key, stream = stream_key(number, name_of), group.stream(name_of)
            assert found[key].shape == (stream.layers, stream.heads, stream.dim, stream.dim)
            assert np.isfinite(found[key]).all()
            assert stream.width == 0 or np.trace(found[key], axis1=2, axis2=3).max() > 0
    dumped = lm.dump(model, ids)
    dumped.sensitivity = found
    dumped.__post_init__()


def test_of_a_window_the_oldest_three_quarters_count():
    model, ids = build("gemma3_text"), tokens_of("gemma3_text", 63)
    energy = sensitivity(model, ids)["1.k.energy"].sum(axis=(0, 1))
    context = 63 * CONTEXT_TOKENS // (CONTEXT_TOKENS + PREDICTED_TOKENS)
    # What follows sees 11 tokens and itself: the oldest one is held, and changes nothing.
    assert list(np.flatnonzero(energy)) == list(range(context - 11, context - 3))


def test_the_sensitivity_of_a_window_is_the_gradient_of_its_unrotated_keys():
    model, ids = build("gemma3_text"), tokens_of("gemma3_text", 40)
    spec, cache = cache_spec(model), make_prompt_cache(model)
    lm.prefill(model, ids[:30], cache)
    pairs = {index: _tokens_of(entry) for index, entry in _described(cache, spec)}
    layer, following = spec.window_layers[0], mx.array([ids[30:]])
    row, error = 5, 1e-2 * mx.random.normal((1, 2, 12, 16), key=mx.random.key(0))
    moved = {**pairs, layer: _perturb(pairs[layer], (error, mx.zeros_like(error)), spec.layers[layer], 30)}
    rope = spec.layers[layer].keys.rope
    back = rope.unrotate(moved[layer][0], 18) - rope.unrotate(pairs[layer][0], 18)
    np.testing.assert_allclose(np.array(back[:, :, row]), np.array(error[:, :, row]), atol=1e-5)
    changed = [model(following, cache=_rebuild_cache(model, spec, cache, each)) for each in (pairs, moved)]
    assert not mx.allclose(*changed, atol=1e-6)


def test_models_are_in_evaluation_again_and_leave_kernels_out_only_meanwhile(monkeypatch):
    model, seen = build("qwen3_next"), []
    call = type(model).__call__
    monkeypatch.setattr(
        type(model), "__call__", lambda self, *a, **k: seen.append(self.training) or call(self, *a, **k)
    )
    sensitivity(model, tokens_of("qwen3_next", 20))
    assert any(seen), "no pass was run in training"
    assert not any(part.training for part in model.modules())


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


@pytest.mark.parametrize("name", [*DIFFERENT, "gemma3_text"])
def test_one_run_gives_the_dump_and_the_sensitivity_that_two_give(name):
    window = name == "gemma3_text"
    model, tokens = (build(name), tokens_of(name, 48)) if window else (tiny_model(name), tiny_tokens(48))
    found = dump_with_sensitivity(model, tokens, seed=3, fingerprint="f00d")
    expected, measured = lm.dump(model, tokens), sensitivity(model, tokens, seed=3)
    assert found.spec == expected.spec
    assert found.fingerprint == "f00d"
    for group in range(len(found.spec.groups)):
        for stream in STREAMS:
            np.testing.assert_allclose(found.stream(stream, group), expected.stream(stream, group), atol=2e-5)
    assert found.sensitivity.keys() == measured.keys()
    for key, array in measured.items():
        assert np.array_equal(found.sensitivity[key], array), key


@pytest.mark.parametrize("length", [15, 673])
def test_a_stretch_is_neither_too_short_nor_too_long(length):
    with pytest.raises(InputError, match="tokens"):
        dump_with_sensitivity(tiny_model("llama"), tiny_tokens(length))

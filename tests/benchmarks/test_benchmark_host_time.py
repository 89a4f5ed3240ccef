"""Host time of a token: what stands in for Metal has its shapes, what was recorded is what the model asked, and ratios are right."""

import mlx.core as mx
import pytest
from conftest import tiny_model
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import recorded, stubs
from benchmarks.experiments import host_time
from mlxkv.kernels import metal
from mlxkv.live import make_cache

TOKENS = [(7 * place) % 97 for place in range(90)]
X = mx.ones((1, 2, 3, 64))


@pytest.mark.parametrize(
    "call",
    [
        lambda: mx.fast.rms_norm(X, mx.ones(64), 1e-5),
        lambda: mx.fast.layer_norm(X.astype(mx.float16), None, None, 1e-5),
        lambda: mx.fast.rope(X, 64, traditional=False, base=1e4, scale=1.0, offset=mx.array(3)),
        lambda: mx.fast.scaled_dot_product_attention(X, X[..., :1, :], X[..., :1, :32], scale=1.0, mask="causal"),
        lambda: mx.quantize(X, group_size=32, bits=4),
    ],
)
def test_what_stands_in_for_metal_is_one_operation_of_the_same_shape_and_type(call):
    right = call()
    with stubs.metal_path():
        found = call()
    stubs.compute_zeros()
    right, found = ([each] if isinstance(each, mx.array) else list(each) for each in (right, found))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in right]
    assert host_time.operations(*found) - host_time.operations(X) <= 4  # its inputs' own, and one


def test_kernels_are_counted_and_refused_with_other_arrays_than_they_declare():
    kernel, more = metal.Kernel("any", ("x",), ("y",)), {"output_shapes": [(2,)], "output_dtypes": [mx.float16]}
    before = metal.available, metal.compiled, mx.fast.rope
    with stubs.metal_path() as launches:
        assert metal.available()
        (found,) = kernel(inputs=[X], grid=(1, 1, 1), threadgroup=(1, 1, 1), **more)
        with pytest.raises(ValueError, match="any takes 1 inputs and 1 outputs"):
            kernel(inputs=[X, X], grid=(1, 1, 1), threadgroup=(1, 1, 1), **more)
    assert (found.shape, found.dtype, launches) == ((2,), mx.float16, {"any": 1})
    assert (metal.available, metal.compiled, mx.fast.rope) == before


@pytest.mark.parametrize(("chunk", "make"), [
    (16, make_prompt_cache),
    (40, lambda model: make_cache(model, "h2o", heavy=8, recent=4)),  # in one chunk, so that the model notices nothing
])  # fmt: skip
def test_a_cache_that_was_asked_again_is_the_one_that_the_model_fills(chunk, make):
    model = tiny_model("llama")
    replayed, right = make(model), make(model)
    recorded.replay(replayed, recorded.record(model, TOKENS[:40], chunk))
    for start in range(0, 40, chunk):
        model(mx.array([TOKENS[start : min(40, start + chunk)]]), cache=right)
    logits = [model(mx.array([[5]]), cache=cache) for cache in (replayed, right)]
    assert mx.allclose(*logits, atol=1e-5)


def test_on_both_paths_every_cache_is_timed_and_counted():
    model = tiny_model("llama", head_dim=64)
    recording = recorded.record(model, TOKENS[:80], 40)
    found = {}
    for path, entered in host_time.PATHS.items():
        with entered() as launches:
            caches = host_time.filled(model, ("full", "int8"), recording)
            rows = host_time.measured(model, caches, TOKENS[80:], launches)
        found[path] = {row["cache"]: row for row in rows}
        assert list(found[path]) == [*host_time.THEIRS, "full", "int8"]
        assert {len(row["seconds"]) for row in rows} == {10 - host_time.WARM_UP}
        assert all(row["calls"] > 0 and row["operations"] > 0 for row in rows)
    assert found["CPU"]["int8"]["launches"] == found["Metal"]["full"]["launches"] == 0
    assert found["Metal"]["int8"]["launches"] >= 1
    for name in found["CPU"]:  # MLX's fast operations are a dozen on a CPU
        assert found["Metal"][name]["operations"] < found["CPU"][name]["operations"]


def test_the_report_has_ratios_to_mlx_lms_cache_on_the_same_path():
    samples = [
        {"path": path, "length": 1024, "layers": 10, "cache": cache, "calls": 30.0, "operations": operations,
         "launches": 1.0, "seconds": [1e-3 * factor, 2e-3 * factor, 6e-3 * factor]}
        for path, base in (("CPU", 1), ("Metal", 0.5))
        for cache, factor, operations in (("KVCache", base, 40.0), ("int8", 1.2, 50.0))
    ]  # fmt: skip
    config = {"model": "smollm2-135m", "sizes": [{"length": 1024}], "load_average": 0.1}
    result = {"config": config, "summary": host_time.summarise(samples)}
    said = host_time.section(result)
    assert host_time.brief(result).endswith("Metal's kernels stubbed: 2.40 (`int8`).")
    assert "1,024 tokens, 10 layers, the CPU path; 3 tokens decoded:" in said
    assert "| `int8` | 240 | 180 to 480 | 1.20 | 1.20 | 30.0 | 50.0 | 1.25 |  |" in said
    assert "| `int8` | 240 | 180 to 480 | 2.40 | 2.40 | 30.0 | 50.0 | 1.25 | 1.0 |" in said
    assert host_time.figure(result).axes[0].get_xlabel() == "host time a token, of KVCache's"

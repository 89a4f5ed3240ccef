"""What profiling works out: bytes from settings, seconds of parts within parts, and the words that follow from numbers."""

import time

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import profiling
from benchmarks.profiler import PARTS, REST, Profiler, in_parts
from benchmarks.theory import theory
from mlxkv import live, lm
from mlxkv.evaluate.variants import baseline
from mlxkv.evaluate.variants import live_variant as live_variant

TOKENS = tiny_tokens(700)
EXACT = ["full", "int8", "int4", "kivi-2", "kivi-4", "h2o-256", "streaming-llm-256", "mp-kvm-256", "sketch-topk-256",
         "sketch-aggregate-256"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head_dim=64, num_hidden_layers=1)


@pytest.mark.parametrize("tokens", [150, 700])
@pytest.mark.parametrize("preset", EXACT)
def test_theory_is_what_a_cache_holds(model, preset, tokens):
    held = live_variant(preset).build(model, TOKENS[:tokens])
    assert held.sizes["cache_bytes"] == theory(model, preset, tokens)


def test_theory_of_smartkv_is_its_budget_and_of_the_whole_cache_that_of_full(model):
    assert theory(model, "smartkv-0.3", 700) == round(0.3 * 2 * 700 * 2 * 2 * 64)
    assert theory(model, "whole", 700) == theory(model, "full", 700) == 768 * 2 * 2 * 64 * 4
    assert theory(model, "whole", 700) == baseline().build(model, TOKENS).sizes["cache_bytes"]


def test_a_part_within_a_part_counts_for_itself_alone():
    profiler = Profiler()
    inner = profiler.timed("inner", lambda: time.sleep(0.03))

    def work():
        time.sleep(0.01)
        inner()

    profiler.timed("outer", work)()
    assert profiler.seconds["inner"] >= 0.03
    assert 0.01 <= profiler.seconds["outer"] < 0.035


def test_work_that_was_waiting_counts_for_who_left_it():
    profiler = Profiler()
    big = mx.random.normal((1200, 1200))
    mx.eval(big)

    def outer():
        return inner(big @ big @ big @ big)

    inner = profiler.timed("inner", lambda x: x[:1] + 1)
    profiler.timed("outer", outer)()
    assert profiler.seconds["outer"] > 3 * profiler.seconds["inner"]


@pytest.mark.parametrize("preset", ["smartkv-0.5", "h2o-96", "mp-kvm-96", "sketch-topk-256"])
def test_parts_of_a_step_are_those_the_method_has_and_change_nothing(model, preset):
    before = live.attention_mass
    cache, plain = (live_variant(preset).build(model, TOKENS[:300]).cache for _ in range(2))
    token = in_parts("token", lambda: lm.prefill(model, TOKENS[300:301], cache))
    chunk = in_parts("chunk", lambda: lm.prefill(model, TOKENS[301:420], cache))
    assert live.attention_mass is before
    assert list(token["parts"]) == [*PARTS, REST]
    assert sum(chunk["parts"].values()) == pytest.approx(chunk["seconds"])
    assert token["parts"]["weights again"] == 0
    missing = {"importance"} if preset == "h2o-96" else set()
    assert {part for part, seconds in chunk["parts"].items() if seconds <= 0} == missing
    lm.prefill(model, TOKENS[300:301], plain)
    lm.prefill(model, TOKENS[301:420], plain)
    same = [mx.array_equal(a, b).item() for a, b in zip(cache[0].state, plain[0].state, strict=True)]
    assert all(same)


def test_python_is_what_is_not_spent_in_evaluating(model):
    sizes = profiling.Sizes((), (), counted=5)
    (record,) = profiling.dissected(model, "full", baseline().build(model, TOKENS[:50]).cache, TOKENS, sizes)
    assert 0 < record["evaluating_seconds"] < record["seconds"]


def samples():
    parts = {
        "attention": 0.02,
        "weights again": 0.0,
        "importance": 0.01,
        "reallocation": 0.0,
        "storing": 0.0,
        REST: 0.07,
    }
    found = []
    for name, factor in (("whole", 1), ("h2o-512", 2), ("smartkv-0.5", 0.5)):
        sizes = dict.fromkeys(("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes"), 4e6)
        found += [
            {"measured": "memory", "variant": name, "theory_bytes": 100, "resident_bytes": 100 + 5 * factor, **sizes},
            {"measured": "latency", "variant": name, "seconds": [[0.08 * factor], [0.08], [0.08 * factor]],
             **dict.fromkeys(("prefill_seconds", "token_seconds", "slowest_token_seconds", "prefill_relative"), 1),
             "decode_relative": 1 / factor},
            {"measured": "python", "variant": name, "seconds": 4.0, "evaluating_seconds": 3.0},
        ]  # fmt: skip
        if name != "whole":
            again = {**parts, "reallocation": 0.05, REST: 0.02}
            found += [{"measured": "token", "variant": name, "seconds": 0.1, "parts": p} for p in (parts, parts, again)]
            chunk = {**parts, "weights again": 0.04, REST: 0.03}
            found.append({"measured": "chunk", "variant": name, "plain_seconds": 0.2, "seconds": 0.1, "parts": chunk})
    return found


def test_the_summary_pairs_rounds_and_tells_cadence_steps_from_others():
    _, h2o, _ = profiling.summarised(samples())
    assert h2o["decode_relative_rounds"] == [0.5, 1]
    assert h2o["python_share"] == 0.25
    assert (h2o["token"]["reallocations"], h2o["token"]["steps"]) == (1, 3)
    assert h2o["token"]["reallocation_seconds"] == pytest.approx(0.05)
    assert h2o["token"]["parts"]["reallocation"] == pytest.approx(0.05 / 3)
    assert h2o["token"]["plain_seconds"] == pytest.approx(0.4 / 3)
    assert h2o["chunk"]["plain_seconds"] == 0.2


def test_section_and_figure_are_made_from_the_numbers():
    result = {"summary": profiling.summarised(samples()), "config": {"context": 1024, "chunk": 256}}
    text = profiling.section(result)
    assert "within 10.0 % (the farthest is h2o-512)" in text
    assert "smartkv, for which theory is a limit, holds 102.5 % to 102.5 % of it" in text
    assert "decoding runs at 0.50 (h2o-512) to 2.00 (smartkv-0.5) of the speed; faster in every round: none." in text
    assert "weights again and keeping importance takes 50.0 % to 50.0 % of a prefill chunk" in text
    axes = profiling.figure(result).axes
    assert [axis.get_title() for axis in axes] == ["a decoded token", "a prefill chunk of 256 tokens"]
    widths = [bar.get_width() for bar in axes[1].patches]
    assert sum(widths) == pytest.approx(2 * 1e3 * 0.1)

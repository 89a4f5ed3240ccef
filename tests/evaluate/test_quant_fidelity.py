import copy
import importlib.util
import inspect

import mlxkv  # noqa: F401  # before mlx.core: it loads OpenBLAS

# isort: split
import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from zoo.build import build, tokens

from mlxkv import stock
from mlxkv.errors import PresetError, UnsupportedError
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, iter_logits, live_variant
from mlxkv.integrations.quant_fidelity import InChunks, LiveMethod
from mlxkv.live.base import LayerCache, check_consistent
from mlxkv.live.seam import make_cache
from mlxkv.models import cache_spec

if importlib.util.find_spec("mlx_quant_fidelity") is None:
    pytest.skip("mlx-quant-fidelity is not installed", allow_module_level=True)

from mlx_lm.models.cache import make_prompt_cache
from mlx_quant_fidelity import KVCacheMethod
from mlx_quant_fidelity.corpora.provenance import Corpus, CorpusProvenance
from mlx_quant_fidelity.errors import ExactZeroError
from mlx_quant_fidelity.probes.kv import score_kv_config

PRESETS = ["int4", "smartkv-0.5", "h2o-96"]


def corpus_of(tokens):
    facts = CorpusProvenance("random", "none", "none", len(tokens), len(tokens), "none", "drop", "none", len(tokens))
    return Corpus((mx.array(tokens),), facts)


def theirs(model, tokens, method, **options):
    return score_kv_config(model, corpus_of(tokens), model_id="tiny", method=method, **options)


def same(report, record):
    assert report.kl.mean == pytest.approx(record["kl"], rel=1e-3, abs=1e-6)
    assert report.flip_rate == pytest.approx(1 - record["top1_agreement"], abs=1e-6)
    assert report.perplexity_ref == pytest.approx(record["perplexity_reference"], rel=1e-4)
    assert report.perplexity_quant == pytest.approx(record["perplexity"], rel=1e-4)


def test_the_adapter_has_every_member_of_the_protocol_with_its_parameters():
    for name, member in vars(KVCacheMethod).items():
        if isinstance(member, property):
            assert isinstance(vars(LiveMethod)[name], property)
        elif inspect.isfunction(member) and not name.startswith("_"):
            assert [*inspect.signature(member).parameters] == [*inspect.signature(vars(LiveMethod)[name]).parameters]


@pytest.mark.parametrize("preset", PRESETS)
def test_fed_in_chunks_their_numbers_are_ours(preset):
    model, tokens = tiny_model("llama"), tiny_tokens(200)
    exact = mx.concatenate([*iter_logits(model, make_prompt_cache(model), tokens, 16)])
    held = mx.concatenate([*iter_logits(model, make_cache(model, preset), tokens, 16)])
    report = theirs(InChunks(model, 16), tokens, LiveMethod(model, preset))
    assert report.kl.mean > 1e-5
    same(report, fidelity.compare(exact, held, tokens))


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite"])
def test_a_converted_prefix_measures_what_our_own_evaluation_holds(name):
    model, tokens = tiny_model(name), tiny_tokens(300)
    record = fidelity.evaluate(model, [baseline(), live_variant("int4")], tokens, context_tokens=200, chunk=300)[1]
    report = theirs(model, tokens, LiveMethod(model, "int4"), quantize_start=200)
    assert report.kl.mean > 1e-5
    same(report, record)


def test_layers_without_keys_and_values_keep_their_state_when_a_prefix_is_converted():
    model, tokens = tiny_model("lfm2"), tiny_tokens(200)
    cache = make_prompt_cache(model)
    model(mx.array([tokens]), cache=cache)
    converted = LiveMethod(model, "int4").convert_prefix(cache)
    assert converted[0] is cache[0]
    assert converted[1].offset == len(tokens)


# Windows that the text has left or not, lists of caches, chunks that stay mlx-lm's own.
@pytest.mark.parametrize("length", [8, 150])
@pytest.mark.parametrize(
    ("name", "preset"),
    [("gemma3_text", "int8"), ("gemma3_text", "sliding-window"), ("deepseek_v32", "full"), ("llama4", "int8")],
)
def test_a_prefix_of_caches_of_every_kind_is_converted(name, preset, length):
    model, text = build(name), tokens(name, length + 4)
    cache = make_prompt_cache(model)
    model(mx.array([text[:length]]), cache=cache)
    method = LiveMethod(model, preset)
    converted = method.convert_prefix(copy.deepcopy(cache))
    held = [entry for entry in stock.entries(converted) if isinstance(entry, LayerCache)]
    assert {entry.offset for entry in held} == {length}
    assert method.measured_bytes(converted) == sum(entry.nbytes for entry in held) > 0
    check_consistent(converted)
    for token in text[length:]:
        found, expected = (model(mx.array([[token]]), cache=each)[0, -1] for each in (converted, cache))
        assert mx.allclose(found, expected, atol=0.05 * mx.abs(expected).max().item())


def test_a_prefix_is_refused_where_a_method_needs_the_queries():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match="without its queries"):
        theirs(model, tiny_tokens(64), LiveMethod(model, "h2o-96"), quantize_start=32)


def test_a_text_in_one_chunk_measures_nothing_and_they_say_so():
    model = tiny_model("llama")
    with pytest.raises(ExactZeroError):
        theirs(model, tiny_tokens(300), LiveMethod(model, "int4"))


def test_an_unknown_preset_is_refused_at_once():
    with pytest.raises(PresetError, match="int4"):
        LiveMethod(None, "int5")


def test_bytes_are_those_held_for_each_token_seen():
    model, tokens = tiny_model("llama"), tiny_tokens(201)
    cache = make_cache(model, "h2o-96")
    list(iter_logits(model, cache, tokens, 16))
    report = theirs(InChunks(model, 16), tokens, LiveMethod(model, "h2o-96"))
    assert report.measured_kv_bytes_per_token == round(sum(layer.nbytes for layer in cache) / 200)


def test_the_section_names_what_does_not_agree_and_what_is_refused():
    from benchmarks.experiments import quant_fidelity

    scores = {"kl": 0.01, "flip_rate": 0.1, "perplexity": 8.0}
    base = {"text": 0, "cache": "int8", "ours": scores, "theirs": scores, "refused": None}
    samples = [
        {**base, "feed": "chunks"},
        {**base, "feed": "chunks", "cache": "int4", "theirs": {**scores, "kl": 0.0101}},
        {**base, "feed": "prefix", "cache": "h2o-256", "theirs": None, "refused": "UnsupportedError"},
        {**base, "feed": "whole", "theirs": None, "refused": "ExactZeroError", "ours": {**scores, "kl": 0.0}},
    ]
    rows = quant_fidelity.summarise(samples)
    said = quant_fidelity.section({"summary": rows, "config": {"texts": 1}})
    assert [row["agree"] for row in rows if "agree" in row] == [True, False]
    assert "Of 2 measurements that both make, 1 agree to rounding; not int4 (chunks)." in said
    assert "cannot convert a prefix for h2o-256" in said
    assert "refuses 1 of 3 caches" in said
    assert "| prefix | h2o-256 | - | 0.01 | - | 0.100 | - | 8.000 |" in said


def test_bytes_per_token_are_those_of_keys_and_values_at_16_bits():
    model = tiny_model("llama")
    held = live_variant("int4").build(model, tiny_tokens(50)).sizes
    told = LiveMethod(model, "int4").bytes_per_token(n_layers=2, n_kv_heads=2, head_dim=8)
    assert told == held["fp16_bytes"] / held["tokens"]


def test_measured_bytes_are_those_of_attention_alone():
    model = tiny_model("lfm2")
    held = live_variant("int8").build(model, tiny_tokens(50))
    states = sum(
        held.cache[layer].nbytes for layer in set(range(len(held.cache))) - set(cache_spec(model).attention_layers)
    )
    assert states
    assert LiveMethod(model, "int8").measured_bytes(held.cache) == held.sizes["cache_bytes"] - states

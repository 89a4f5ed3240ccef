"""A plan from config.json alone: the bytes of real caches, without a weight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from zoo.build import configuration

from benchmarks import planned as generator
from mlxkv.errors import FormatError, InputError, ModelNotFoundError, UnsupportedError
from mlxkv.planning import configs, plan, plans, read_config, usable_bytes
from mlxkv.planning.building import build_model, weigh
from mlxkv.planning.caches import TracedModel
from mlxkv.planning.measured import measured, measurements

FIXTURES = Path(__file__).parents[1] / "fixtures" / "configs"
QWEN3_8B = FIXTURES / "qwen3-8b.json"
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY_LLAMA = {"model_type": "llama", **TINY["llama"]}
KLT = {"klt-0.11", "klt-0.125", "klt-0.15", "klt-0.2", "klt-0.25"}


def caches(found):
    return {each.cache: each for each in found.caches}


def test_the_cache_of_qwen3_8b_at_32k_is_4_83_gb_in_fp16():
    found = plan(QWEN3_8B, 32_768, memory=32 * 10**9)
    rows = caches(found)
    assert rows["fp16"].bytes == 36 * 2 * 8 * 128 * 2 * 32_768 == 4_831_838_208
    assert rows["--kv-bits 8"].bytes / rows["fp16"].bytes == (8 + 32 / 64) / 16
    assert rows["--kv-bits 4"].bytes / rows["fp16"].bytes == (4 + 32 / 64) / 16
    assert 0.53 < rows["int8"].share < 0.54
    assert rows["smartkv-0.3"].share == pytest.approx(0.3)
    assert (found.trained_context, found.weights.parameters) == (40_960, 8_190_735_360)
    assert found.kinds() == [{"layers": 36, "window": None, "keys": [8, 128], "values": [8, 128]}]


def test_every_live_preset_and_every_measured_file_is_planned():
    from mlxkv.live import live_methods
    from mlxkv.presets import presets_of

    found = plan(TINY_LLAMA, 2000)
    assert {each.cache for each in found.caches if each.kind == "live"} == set(presets_of(live_methods.names()))
    assert {each.cache for each in found.caches if each.kind == "file"} == {
        each.cache for each in measurements() if each.cache.endswith(" file")
    }
    json.dumps(found.to_json())


@pytest.mark.parametrize("memory", [700_000, 12_345_678, 10**9])
def test_the_longest_context_is_the_last_that_fits(memory):
    def planned(tokens):
        return caches(plan(TINY_LLAMA, tokens, memory=memory, presets=["int8", "smartkv-0.5", "kivi-2"]))

    for name, row in planned(1000).items():
        if row.kind != "file" and row.bytes is not None:
            assert planned(row.longest_context)[name].fits, name
            more = int(row.longest_context * 1.002) + 256  # when a block is packed, bytes fall a little
            assert not planned(more)[name].fits, name


@pytest.mark.parametrize(
    "size",
    [
        lambda n: 7 * n + 1000,
        lambda n: 10**6 if n > 999 else 0,
        lambda n: min(n, 5000) * 10 + max(0, n - 10**6),
        lambda n: n * n // 100,
        lambda n: n.bit_length() * 4000,
        lambda n: n // 4096 * 4096,
    ],
)
@pytest.mark.parametrize("room", [0, 1, 50_000, 60_000, 999_999])
def test_the_longest_context_is_found_soon_whatever_the_sizes(size, room):
    asked = []
    found = plans._longest(lambda n: asked.append(n) or size(n), room, 1000)
    assert len(asked) < 200
    assert found == 0 or size(found) <= room
    assert (more := found + 1 + (found >> 10)) > plans.MOST_CONTEXT or size(more) > room


def test_a_model_that_does_not_fit_has_no_context_and_a_bounded_cache_that_fits_has_any():
    small, large = (caches(plan(LLAMA_70B, 1000, memory=m * 10**9, presets=["h2o-96"])) for m in (64, 512))
    assert (small["fp16"].fits, small["fp16"].longest_context) == (False, 0)
    assert (small["h2o-96"].fits, small["h2o-96"].longest_context) == (False, 0)
    assert (large["h2o-96"].fits, large["h2o-96"].longest_context, large["h2o-96"].grows) == (True, None, False)


@pytest.mark.parametrize("tokens", [50, 1000, 4099])
def test_a_cache_grows_that_keeps_every_token_whatever_the_length(tokens):
    growing = {each.cache for each in plan(LLAMA_70B, tokens).caches if each.kind == "live" and each.grows}
    assert growing == {"full", "int8", "int4", "kivi-2", "kivi-4", "smartkv-0.3", "smartkv-0.5", "smartkv-0.7"} | KLT


def test_a_bounded_cache_that_is_not_full_yet_fits_only_if_it_will_when_it_is():
    memory = 50_000 * 3 // 2 + weigh(build_model(TINY_LLAMA)[1], TINY_LLAMA).bytes * 3 // 2
    row = caches(plan(TINY_LLAMA, 50, memory=memory, presets=["h2o-1024"]))["h2o-1024"]
    assert (row.fits, row.grows) == (True, False)
    assert 50 < row.longest_context < 1024


def test_the_prompt_of_windows_takes_a_chunk_more_while_it_is_read():
    config = configuration("gemma3_text")
    row = caches(plan(config, 10_000, presets=[]))["fp16"]
    windows = [layer for layer in plan(config, 10_000, presets=[]).layers if layer.window]
    more = sum((2048 - 1) * 2 * 2 * layer.keys.heads * layer.keys.dim for layer in windows)
    assert windows
    assert row.reading_bytes - row.bytes == more


def test_chunks_of_ten_million_tokens_are_as_large_as_those_of_a_shorter_text():
    traced, more = TracedModel(*build_model(configuration("llama4"))), 2048 * 5000
    whole = [layer for layer in traced.layers if layer is not None]  # those that keep every token
    grown = sum(2 * slot.heads * slot.dim for layer in whole for slot in layer)
    assert traced.own(30_001 + more).held - traced.own(30_001).held == more * grown


def test_batches_multiply_bytes():
    one, four = (caches(plan(configuration("qwen3_next"), 700, batch=n)) for n in (1, 4))
    for name in ("fp16", "int4", "h2o-96", "mp-kvm-96", "smartkv-0.5"):
        assert four[name].bytes == pytest.approx(4 * one[name].bytes, rel=1e-6)


@pytest.mark.parametrize(
    ("memory", "usable"), [(8, 16 / 3), (16, 32 / 3), (32, 64 / 3), (36, 27), (64, 48), (96, 72), (192, 144)]
)
def test_two_thirds_of_a_small_macs_memory_are_for_the_gpu_and_three_quarters_of_a_large_ones(memory, usable):
    assert usable_bytes(memory * 2**30) == int(usable * 2**30)


def test_weights_are_as_large_as_those_of_a_quantized_model():
    config = {**TINY_LLAMA, "quantization": {"group_size": 32, "bits": 4}}
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    parameters = sum(x.size for _, x in tree_flatten(model.parameters()))
    nn.quantize(model, 32, 4)
    size = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    assert weigh(build_model(config)[1], config) == (parameters, size, "4-bit, group 32")


@pytest.mark.parametrize(
    ("stated", "precision"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "4-bit, group 32"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "bfloat16"),
        ({"quantization_config": {"quant_method": "stone tablets"}}, "an unknown quantization"),
        ({"quantization": {"group_size": 32, "bits": 77}}, "an unknown quantization"),
        ({"torch_dtype": "float32"}, "float32"),
    ],
)
def test_the_weights_precision_is_the_one_that_the_config_states(stated, precision):
    config = {**TINY_LLAMA, **stated}
    found = weigh(build_model(config)[1], config)
    assert found.precision == precision
    assert (found.bytes is None) == precision.startswith("an unknown")


def test_without_a_known_size_of_weights_nothing_is_said_to_fit():
    config = {**TINY_LLAMA, "quantization_config": {"quant_method": "stone tablets"}}
    assert {each.fits for each in plan(config, 100, memory=10**10).caches} == {None}


def test_an_output_layer_that_the_weights_do_not_have_is_not_counted():
    config = {key: value for key, value in configuration("gemma3_text").items() if key != "tie_word_embeddings"}
    vocabulary = config["vocab_size"] * config["hidden_size"]
    tied, untied = (weigh(build_model(c)[1], c) for c in (config, {**config, "tie_word_embeddings": False}))
    assert untied.parameters - tied.parameters == vocabulary


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "mistral"}, "llama"),
        ({"model_type": "kimi_k2"}, "deepseek_v3"),
        ({"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"]}, "bailing_moe_v3"),
        ({"model_type": "nemotron-nas"}, "nemotron-nas"),
    ],
)
def test_a_type_is_of_the_module_that_mlx_lm_takes(config, name, monkeypatch):
    from mlx_lm.utils import _get_classes

    monkeypatch.delitem(sys.modules, "mlx_lm.utils")  # so that its tables are read as text
    found, model, arguments = configs.model_class(config)
    assert (found, (model, arguments)) == (name, _get_classes(config))


def test_a_text_model_within_another_is_found():
    config = configuration("gemma3")
    assert "text_config" in config
    found = plan(config, 100, presets=["int8"])
    window = config["text_config"]["sliding_window"]
    assert {kind["window"] for kind in found.kinds()} == {window, None}


def test_what_costs_a_quantized_cache_its_life_in_mlx_lm_is_said():
    rows = caches(plan(configuration("gemma3_text"), 10_000))
    assert rows["--kv-bits 8"].bytes is None
    assert "RotatingKVCache" in rows["--kv-bits 8"].note
    assert "begins after 5,000" in caches(plan(LLAMA_70B, 1000, presets=[]))["--kv-bits 4"].note
    rows = caches(plan(configuration("deepseek_v32"), 10_000))
    assert "as they are" in rows["--kv-bits 8"].note
    assert "chooses tokens by their index" in rows["h2o-96"].note


def test_the_measured_model_is_the_one_that_is_more_alike():
    whole, windowed = (caches(plan(configuration(name), 3000))["int4"] for name in ("qwen3", "gemma3_text"))
    assert (whole.measurement.model, windowed.measurement.model) == ("smollm2-135m", "gemma3-270m")
    assert measured("no such cache", windows=False) is None


def test_what_ships_along_is_what_was_measured():
    """After new results: python -m benchmarks.planned."""
    assert generator.PATH.read_text() == generator.text()


def test_the_page_shows_what_the_command_prints():
    """After a change of either: python -m benchmarks.planned."""
    assert generator.page(generator.PAGE.read_text()) == generator.PAGE.read_text()


@pytest.mark.parametrize(
    "each", [m for m in measurements() if m.result in ("kv_bits", "rotation")], ids=lambda m: m.cache
)
def test_what_is_planned_for_the_measured_model_is_what_it_held(each):
    config = {**TINY_LLAMA, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64}
    row = caches(plan(config, each.tokens, presets=[] if each.cache.startswith("--") else [each.cache]))[each.cache]
    assert row.share == pytest.approx(each.share, abs=1e-6)


def test_a_measurement_with_other_settings_than_the_presets_is_left_out():
    assert generator._is_preset("kivi-2", {"bits": 2, "group": 32, "residual": 124, "sinks": 4, "rotate": True})
    assert not generator._is_preset("kivi-2", {"bits": 2, "group": 32, "residual": 128})
    assert not generator._is_preset("int4", "Settings()")
    assert generator._is_preset("sliding-window-256", "Settings(window=256)")
    assert not generator._is_preset("uniform-2", "Settings(bits=2)")


def test_a_model_that_reads_numbers_while_it_runs_is_refused_and_its_weights_are_not_computed():
    with pytest.raises(UnsupportedError, match="reads numbers"):
        plan(configuration("dbrx"), 100)


def test_a_classes_own_cache_is_followed_through_the_model():
    name, model = build_model(configuration("deepseek_v41"))
    sizes = [TracedModel(name, model).own(tokens).held for tokens in (200, 400, 800)]
    assert sizes[0] < sizes[1] < sizes[2]


SCRIPT = """
import resource, sys
from mlxkv.cli._deferred import defer_mlx_lm
defer_mlx_lm()
from mlxkv.planning import plan
import mlx.core as mx
found = plan({config!r}, 131072, memory=10**11)
assert found.weights.parameters > 70 * 10**9 and found.caches[0].bytes == 80 * 2 * 8 * 128 * 2 * 131072
assert "transformers" not in sys.modules
assert mx.get_peak_memory() < 2**20, mx.get_peak_memory()
if sys.platform == "darwin":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
else:  # there that is at least what the parent had
    peak = 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
assert peak < 400 * 2**20, peak
from mlx_lm.models.cache import KVCache
from mlx_lm import generate, load, stream_generate
import mlx_lm, mlx_lm.models, mlx_lm.utils
assert mlx_lm.models.cache.KVCache is KVCache
assert sys.modules["mlx_lm.generate"].make_prompt_cache is mlx_lm.models.cache.make_prompt_cache
assert mlx_lm.load is mlx_lm.utils.load is load and mlx_lm.__version__ and set(mlx_lm.__all__) <= set(dir(mlx_lm))
assert not hasattr(mlx_lm, "no_such_name") and "transformers" in sys.modules
print("well")
"""


def test_a_plan_of_70_billion_weights_takes_little_memory_and_leaves_mlx_lm_whole(tmp_path):
    code = SCRIPT.format(config=LLAMA_70B)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.stdout.endswith("well\n"), done.stderr[-2000:]


# Where a config comes from


def test_a_folder_a_file_and_the_configs_content_are_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    sizes = {
        plan(source, 64, presets=[]).caches[0].bytes for source in (tmp_path, tmp_path / "config.json", TINY_LLAMA)
    }
    assert len(sizes) == 1


def test_of_a_hub_id_the_copy_that_is_there_is_taken_first(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    asked = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: str(tmp_path / "config.json"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.append(a))
    assert read_config("org/model") == TINY_LLAMA
    assert asked == []


def test_without_a_network_it_is_said_what_will_do(monkeypatch):
    import huggingface_hub

    def offline(*_):
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ModelNotFoundError, match=r"cannot get config.json of org/model: no network here") as found:
        read_config("org/model")
    assert "config.json that you have will do" in found.value.hint


def test_tagged_floats_are_numbers(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}')
    assert read_config(path)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "\x00\xff", "[" * 100_000, '{"a":' * 5000])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises((FormatError, InputError)):
        plan(path, 64)


HUGE = 10**30


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model_type": None}, InputError),
        ({"model_type": ["llama"]}, InputError),
        ({"model_type": "lama"}, UnsupportedError),
        ({"model_type": "cache"}, UnsupportedError),
        ({"model_type": "../utils"}, UnsupportedError),
        ({"model_type": "utils.x"}, UnsupportedError),
        ({"model_type": ""}, UnsupportedError),
        ({"model_type": "olmo"}, UnsupportedError),
        ({"model_file": "evil.py"}, UnsupportedError),
        ({"num_hidden_layers": 10**9}, InputError),
        ({"num_hidden_layers": -1}, (InputError, UnsupportedError)),
        ({"num_hidden_layers": 0}, (InputError, UnsupportedError)),
        ({"num_hidden_layers": "many"}, InputError),
        ({"num_hidden_layers": HUGE}, InputError),
        ({"num_hidden_layers": 1300}, InputError),
        (
            {"num_key_value_heads": 2**16, "num_attention_heads": 2**16, "head_dim": 2**14},
            (FormatError, InputError),
        ),
        ({"hidden_size": HUGE}, InputError),
        ({"hidden_size": -64}, InputError),
        ({"hidden_size": 64.5}, InputError),
        ({"hidden_size": {"a": 1}}, InputError),
        ({"num_attention_heads": 0}, InputError),
        ({"num_key_value_heads": 0}, (InputError, UnsupportedError)),
        ({"head_dim": -8}, (InputError, UnsupportedError)),
        ({"vocab_size": 2**40}, InputError),
        ({"vocab_size": None}, InputError),
        ({"rope_scaling": {"type": "no such"}}, InputError),
        ({"layer_types": ["sliding_attention"] * 30_000}, (InputError, UnsupportedError)),
        ({"architectures": [["x"], {}]}, None),
        ({"architectures": 7}, None),
        ({"text_config": 7, "quantization": [1]}, None),
    ],
)
def test_a_hostile_config_ends_in_a_typed_error(changes, error):
    config = {**TINY_LLAMA, **changes}
    if error is None:
        assert plan(config, 64, presets=[]).caches[0].bytes
        return
    with pytest.raises(error):
        plan(config, 64, presets=[])


def test_heads_of_a_width_that_no_model_has_are_planned_without_the_matrices_of_live_methods():
    rows = caches(plan({**TINY_LLAMA, "head_dim": 2**14}, 64))
    assert rows["fp16"].bytes == 2 * 2 * 2 * 2**14 * 2 * 64
    assert rows["int4"].bytes is None
    assert "wider than any model's" in rows["int4"].note


def test_the_most_tokens_of_the_most_texts_have_sizes():
    assert caches(plan(LLAMA_70B, 2**24, batch=2**12, memory=2**50, presets=["mp-kvm-96"]))["mp-kvm-96"].fits


def test_what_a_module_of_mlx_lm_prints_is_not_printed(capsys):
    with pytest.raises(UnsupportedError, match="cannot be imported"):
        plan({**TINY_LLAMA, "model_type": "olmo"}, 64)
    assert capsys.readouterr().out == ""


def test_objects_nested_deeply_are_refused():
    deep = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(InputError, match="nests more than"):
        plan({**TINY_LLAMA, "extra": deep}, 64)


def test_a_config_of_too_many_modules_is_refused_in_the_making(monkeypatch):
    monkeypatch.setattr("mlxkv.planning.building.MOST_MODULES", 10)
    with pytest.raises(InputError, match="more than 10 modules"):
        plan(TINY_LLAMA, 64)
    assert nn.Linear(2, 2) is not None


def test_near_names_are_offered_for_an_unknown_type():
    with pytest.raises(UnsupportedError) as found:
        plan({**TINY_LLAMA, "model_type": "qwen33"}, 64)
    assert "qwen3" in found.value.hint


@pytest.mark.parametrize(
    "wrong", [{"context": 0}, {"context": 2**24 + 1}, {"context": 1.5}, {"batch": 0}, {"memory": 0}, {"memory": -1}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        plan(TINY_LLAMA, **{"context": 64, **wrong})

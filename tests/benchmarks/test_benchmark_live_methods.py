"""The live methods' experiment: it measures what decoding each text alone says, and computes what it says."""

from math import exp, log

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens

from benchmarks import calibration, paired
from benchmarks.experiments import live_methods
from benchmarks.variants import UniformConfig, cached_at_once, measure_while_growing, supported
from mlxkv import lm
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import write_dump
from mlxkv.evaluate import metrics
from mlxkv.evaluate.variants import cache_sizes, codec_variant
from mlxkv.live import live_config, make_cache
from mlxkv.live.arrays import iter_arrays
from mlxkv.models import cache_spec

CONFIGS = {
    "full": live_config("full"),
    "int4": live_config("int4"),
    "kivi": live_config("kivi", recent=16),
    "random": live_config("random", tokens=80),
    "h2o": live_config("h2o", heavy=30, recent=30),
    "smartkv": live_config("smartkv", budget=0.7),
    "uniform-16": UniformConfig(bits=16),
}
VARIANTS = [cached_at_once(name, config) for name, config in CONFIGS.items()]
TEXT = tiny_tokens(149)
FP16_BYTES = 2 * 2 * 2 * 2 * 8  # a token of tiny llama: bytes x layers x (K, V) x heads x dims


def named(records, name):
    (record,) = [record for record in records if record["variant"] == name]
    return record


@pytest.mark.parametrize("name", ["llama", "lfm2", "glm4_moe_lite", "gpt2"])
def test_a_context_is_read_in_one_chunk_as_mlx_lm_would(name):
    model, tokens = tiny_model(name), tiny_tokens(150)
    for variant in supported(model, VARIANTS):
        if variant.name == "uniform-16":  # no method of the library's
            continue
        held, alone = variant.build(model, tokens).cache, make_cache(model, CONFIGS[variant.name])
        model(mx.array([tokens]), cache=alone)
        pairs = [pair for entries in zip(alone, held) for pair in zip(*(iter_arrays(entry.state) for entry in entries))]
        assert len(pairs) >= 2 * len(cache_spec(model).attention_layers)
        for ours, theirs in pairs:
            if isinstance(ours, mx.array):
                assert mx.array_equal(ours, theirs), variant.name


def test_records_say_what_decoding_the_text_alone_says():
    model = tiny_model("llama")
    record = named(measure_while_growing(model, VARIANTS, TEXT, 128), "int4")
    logits = []
    for name in ("full", "int4"):
        caches = make_cache(model, name)
        model(mx.array([TEXT[:128]]), cache=caches)
        logits.append(
            mx.concatenate([model(mx.array([chunk]), cache=caches)[0] for chunk in (TEXT[128:144], TEXT[144:-1])])
        )
    targets = mx.array(TEXT[129:])
    assert record["kl"] == pytest.approx(float(metrics.kl_divergence(*logits).mean()), rel=1e-3)
    assert record["top1_agreement"] == pytest.approx(metrics.top1_agreement(*logits))
    assert record["perplexity"] == pytest.approx(metrics.perplexity(logits[1], targets), rel=1e-4)
    assert record["perplexity_reference"] == pytest.approx(metrics.perplexity(logits[0], targets), rel=1e-4)


def test_full_differs_from_itself_by_nothing_and_float16_takes_what_the_yardstick_says():
    records = measure_while_growing(tiny_model("llama"), VARIANTS, TEXT, 128)
    assert [record["variant"] for record in records] == list(CONFIGS)
    full, float16 = named(records, "full"), named(records, "uniform-16")
    assert full["kl"] == 0
    assert full["top1_agreement"] == 1
    assert full["perplexity_delta"] == 0
    assert float16["share_of_fp16"] == pytest.approx(1)
    assert 0 < float16["kl"] < 1e-3


def test_bytes_are_a_mean_over_what_the_chunks_find():
    model, text = tiny_model("llama"), tiny_tokens(128 + 32 + 1)
    record = named(measure_while_growing(model, VARIANTS, text, 128), "int4")
    held = VARIANTS[1].build(model, text[:128]).sizes["cache_bytes"]
    # Two chunks find 4 rows in the tail, and 20 in room for 32.
    assert record["cache_bytes"] == held + 28 * FP16_BYTES / 2
    shares = [held / (128 * FP16_BYTES), (held + 28 * FP16_BYTES) / (144 * FP16_BYTES)]
    assert record["share_of_fp16"] == pytest.approx(sum(shares) / 2)


def test_a_curve_is_read_between_its_points_in_logarithms():
    curve = [(400, 1e-4), (100, 1e-2)]
    assert paired.at_bytes(200, curve) == pytest.approx(1e-3)
    assert paired.at_bytes(50, curve) == pytest.approx(1e-2)
    assert paired.at_bytes(800, curve) == pytest.approx(1e-4)


def test_what_fits_is_a_point_of_the_curve():
    curve = [(400, 1e-4), (100, 1e-2), (200, 1e-3)]
    assert [paired.within_bytes(size, curve) for size in (50, 100, 399, 400)] == [1e-2, 1e-2, 1e-3, 1e-4]


def test_holm_is_the_textbooks():
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_what_is_exact_is_compared_by_the_least_kl():
    assert paired.compare([0.0, -1e-9], [1e-8, 1e-8])["kl_ratio"] == pytest.approx(0.1)


def test_a_comparison_is_of_geometric_means():
    result = paired.compare([1e-3, 4e-3, 1e-2], [2e-3, 8e-3, 5e-3])
    assert result["kl_ratio"] == pytest.approx(0.5 ** (1 / 3))
    assert result["better_on"] == 2
    low, high = result["kl_ratio_interval"]
    assert 0.499 < low < result["kl_ratio"] < high < 2.001
    assert paired.compare([1e-3] * 4, [2e-3] * 4)["kl_ratio_interval"] == pytest.approx([0.5, 0.5])


def test_a_preset_is_compared_at_its_own_bytes_of_each_text():
    def sample(variant, text, size, kl):
        return {"model": "m", "variant": variant, "text": text, "cache_bytes": size, "kl": kl}

    curve = [
        sample(f"uniform-{bits}", text, size, kl)
        for text in "ab"
        for bits, size, kl in ((2, 100, 1e-2), (16, 400, 1e-4))
    ]
    kivi = [sample("kivi-2", text, 200, 2e-3) for text in "ab"]
    between = (2e-3 * 1e-4) ** 0.5  # at the geometric mean of KIVI's and float16's bytes
    ours = [sample("smartkv-0.5", text, 200 * 2**0.5, 2 * between) for text in "ab"]
    rows = live_methods.comparisons([*curve, *kivi, *ours])
    result = {(row["variant"], row["against"]): row for row in rows if row["read"] == "between points"}
    assert list(result) == [("kivi-2", "uniform"), ("smartkv-0.5", "uniform"), ("smartkv-0.5", "kivi")]
    assert result["smartkv-0.5", "kivi"]["kl_ratio"] == pytest.approx(2)
    assert result["kivi-2", "uniform"]["kl_ratio"] == pytest.approx(2)
    assert [row["texts"] for row in rows] == [2] * 6
    (fitting,) = [row for row in rows if (row["against"], row["read"]) == ("kivi", "largest that fits")]
    assert fitting["kl_ratio"] == pytest.approx(2 * between / 2e-3)


def test_means_over_texts_are_also_geometric():
    base = {"model": "m", "variant": "int4", "cache_bytes": 1, "share_of_fp16": 1, "top1_agreement": 1,
            "perplexity_reference": 9, "perplexity_delta": 0}  # fmt: skip
    (row,) = live_methods.fidelity([{**base, "kl": 1e-2}, {**base, "kl": 1e-4}])
    assert row["kl"] == pytest.approx(5.05e-3)
    assert row["kl_geometric"] == pytest.approx(exp((log(1e-2) + log(1e-4)) / 2))
    assert (row["method"], row["texts"]) == ("int4", 2)


def test_a_method_that_a_model_cannot_have_is_left_out_and_named(capsys):
    variants = [*VARIANTS, cached_at_once("smartkv-0.05", live_config("smartkv", budget=0.05))]
    assert supported(tiny_model("llama"), variants) == VARIANTS
    assert "left out: smartkv-0.05: layer 0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    model, path = tiny_model("llama"), tmp_path_factory.mktemp("dumps") / "dump.npz"
    write_dump(path, lm.dump(model, tiny_tokens(400, seed=9), dtype="float16"))
    return CacheCodec(calibrate([path], KVTCConfig(compression_ratio=4)), recent=16)


def test_a_codec_is_scored_beside_live_caches_at_its_files_bytes(codec):
    model = tiny_model("llama")
    records = measure_while_growing(model, [*VARIANTS, codec_variant(codec, "kvtc", "float16")], TEXT, 128)
    assert [record["variant"] for record in records] == [*CONFIGS, "kvtc"]
    kvtc = named(records, "kvtc")
    assert 1e-6 < kvtc["kl"] < 3
    file = codec.compress_dump(lm.dump(model, TEXT[:128], dtype="float16"))
    assert kvtc["cache_bytes"] == pytest.approx(len(file) + 16 * FP16_BYTES / 2)  # two chunks find 0 and 16 after it


def test_a_codecs_score_is_that_of_its_file_read_back(codec):
    model = tiny_model("llama")
    records = measure_while_growing(model, [*VARIANTS[:1], codec_variant(codec, "kvtc", "float16")], TEXT, 128)
    logits = []
    for coded in (False, True):
        dump = lm.dump(model, TEXT[:128], dtype="float16" if coded else "auto")
        cache = lm.restore(model, codec.decompress_dump(codec.compress_dump(dump)) if coded else dump)
        logits.append(
            mx.concatenate([model(mx.array([chunk]), cache=cache)[0] for chunk in (TEXT[128:144], TEXT[144:-1])])
        )
        assert cache_sizes(model, cache)["tokens"] == 148
    assert named(records, "kvtc")["kl"] == pytest.approx(float(metrics.kl_divergence(*logits).mean()), rel=1e-2)


@pytest.fixture(scope="module")
def result():
    """Ten texts of two models. smartkv-0.5 has half of uniform's KL at its bytes, twice that of kvtc; on a miniature, or at
    another budget, nothing is certain."""

    def sample(model, variant, text, share, kl):
        rest = {"top1_agreement": 0.9, "perplexity_reference": 9, "perplexity_delta": 0.1}
        return {"model": model, "variant": variant, "text": text, "cache_bytes": 1000 * share, "share_of_fp16": share,
                "kl": kl, **rest}  # fmt: skip

    samples = []
    for model in ("smollm2-135m", "miniature/glm"):
        for text in range(10):
            samples += [sample(model, "uniform-2", text, 0.25, 4e-2), sample(model, "uniform-16", text, 1, 1e-2)]
            samples += [sample(model, "smartkv-0.3", text, 0.5, (1e-2, 4e-2)[text % 2])]
            if model == "smollm2-135m":
                samples += [sample(model, "smartkv-0.5", text, 0.5, 1e-2), sample(model, "kvtc-4", text, 0.5, 5e-3)]
                samples += [sample(model, "kvtc-rd-30", text, 0.6, 5e-3)]
    summary = {"fidelity": live_methods.fidelity(samples), "paired": live_methods.comparisons(samples)}
    return {"config": {"context": 1024, "predict": 64}, "summary": summary, "quick": False}


def test_the_section_counts_what_is_beyond_chance_after_correction(result):
    text = live_methods.section(result)
    # smartkv: two budgets against uniform read in two ways and kvtc. kvtc: uniform in two ways.
    assert "lower in 2 and higher in 2 of 6 for `smartkv`, lower in 2 and higher in 0 of 2 for `kvtc`, " in text
    assert "of 3 for `kvtc-rd`." in text
    assert "lower in 0 and higher in 0 of 1 for `miniature/glm`." in text
    assert "| `smartkv-0.5` | **0.5 (0.5 to 0.5)**, 10 of 10 |" in text
    assert "| `smartkv-0.3` | 1 (" in text
    assert " † |" not in text


def test_a_comparison_with_a_method_that_has_no_setting_so_small_is_marked(result):
    def smaller(row):
        return {**row, "share_of_fp16": 0.1} if row["variant"] == "kvtc-rd-30" else row

    summary = {**result["summary"], "fidelity": [smaller(row) for row in result["summary"]["fidelity"]]}
    lines = live_methods.section({**result, "summary": summary}).splitlines()
    marked = {line.split("`")[1]: line.count(" † |") for line in lines if " † |" in line}
    assert marked == {"kvtc-rd-30": 3}  # uniform in two ways, and kvtc


def test_the_readme_shows_of_each_method_what_is_closest_within_a_third():
    points = {"full": (2.3, 0), "smartkv-0.5": (0.49, 1e-4), "smartkv-0.3": (0.29, 2e-3), "uniform-2": (0.2, 1e-5),
              "h2o-256": (0.25, 0.05), "h2o-96": (0.09, 0.15), "kvtc-rd-22": (0.03, 0.02)}  # fmt: skip
    rows = [
        {"model": "smollm2-135m", "variant": name, "method": live_methods.method_of(name), "texts": 10, "share_of_fp16": share,
         "kl": kl, "kl_geometric": kl, "top1_agreement": 1, "perplexity_reference": 9, "perplexity_delta": 0}
        for name, (share, kl) in points.items()
    ]  # fmt: skip
    text = live_methods.brief({"summary": {"fidelity": rows}, "config": {"context": 1024, "predict": 64}})
    shown = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert shown == ["full", "smartkv-0.5", "smartkv-0.3", "kvtc-rd-22", "h2o-256"]


def test_corrected_p_is_of_the_comparisons_shown_of_one_method(result):
    found = live_methods.judged(result["summary"])
    ours = [row for row in found.values() if row["group"] == "smartkv"]
    assert len(ours) == 6
    raw = found["smollm2-135m", "smartkv-0.5", "uniform", "between points"]
    assert raw["p"] == 2 / 2**10
    assert raw["p_holm"] == pytest.approx(6 * raw["p"])


def test_another_language_model_alone_is_told_of_as_that_model(result):
    name = "gemma3-270m"
    summary = {
        part: [{**row, "model": name} for row in rows if row["model"] == "smollm2-135m"]
        for part, rows in result["summary"].items()
    }
    ours = {"config": {**result["config"], "model": name}, "summary": summary}
    text, first = live_methods.section(ours), live_methods.section(result)
    assert "Gemma 3 270M after 1,024 tokens" in text
    assert "miniature" not in text.replace("or of a miniature", "")
    assert "| `smartkv-0.5` | **0.5 (0.5 to 0.5)**, 10 of 10 |" in text
    assert text.replace("Gemma 3 270M", "SmolLM2") == first.partition("\n\nThe same on miniatures")[0]


def test_the_figure_tells_every_method_apart(result):
    lines = live_methods.figure(result).axes[0].lines
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert [line.get_label() for line in lines] == ["uniform", "smartkv", "kvtc (files)", "kvtc-rd (files)"]
    assert len(looks) == 4


def test_codecs_of_benchmarks_are_named_by_ratio_and_quality(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(calibration.texts, "calibration", lambda *_: [tiny_tokens(200)])
    made = calibration.codecs(model, None, calibration.QUICK, (), (22, 35))
    assert {name: codec.quality for name, codec in made.items()} == {"kvtc-rd-22": 22, "kvtc-rd-35": 35}
    assert list(calibration.codecs(model, None, calibration.QUICK, (4,), (22,))) == ["kvtc-4", "kvtc-rd-22"]

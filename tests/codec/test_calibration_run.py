"""Calibration in one go: bounded by a budget, resumed where it was interrupted, and measured on text that was held out."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from zoo.build import build

from mlxkv import calibration, lm
from mlxkv.bundled.corpus import Text
from mlxkv.calibration import budget, run, training, work, worth
from mlxkv.codec.calibrate import codec_config
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.klt.tables import Tables, live_slots
from mlxkv.models import cache_spec
from mlxkv.sensitivity import STRETCH_TOKENS
from mlxkv.spec import CacheSpec, Rope, Slot


class Bytes:
    """A tokenizer that makes a token of each byte, after one that begins every text."""

    has_chat_template = False

    def encode(self, text):
        return [1, *(2 + byte % 90 for byte in text.encode())]


class Clock:
    """A clock that moves when work is done."""

    now = 0.0

    def __call__(self):
        return self.now


class Timed(calibration.Calibration):
    """A calibration whose stretches take ten seconds each by its clock, and the machine is as fast as told."""

    def _dump(self, stretch, index):
        dump = super()._dump(stretch, index)
        self.budget.clock.now += 10
        return dump

    def _rest(self, count):
        return 3.0 * count


def sentences(count, seed):
    random = np.random.default_rng(seed)
    words = ["cache", "keys", "values", "window", "a", "the", "of", "tokens", "model", "layers", "and", "reads"]
    return " ".join(random.choice(words, count)) + ".\n"


def some_texts(words=160, kinds=("prose", "code", "chat"), each=3):
    return [
        Text(f"{kind}{i}", kind, sentences(words, 10 * n + i), None)
        for n, kind in enumerate(kinds)
        for i in range(each)
    ]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run.sizes, "machine_flops", lambda: 1e10)
    monkeypatch.setattr(training, "has_own_process", lambda config: False)  # a second each
    return tmp_path / "home"


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def prepared(model, kind=calibration.Calibration, texts=None, config=None, **settings):
    stretches = calibration.cut(Bytes(), some_texts() if texts is None else texts)
    return kind(model, "a/model", stretches, config or KVTCRDConfig(), **settings)


@pytest.mark.parametrize("name", ["llama", "glm4_moe_lite", "lfm2", "gemma3_text"])
def test_a_model_of_any_kind_is_calibrated_and_the_measured_quality_rises(name):
    model = build(name) if name == "gemma3_text" else tiny_model(name)
    calibrated = prepared(model, texts=some_texts(words=60, kinds=("prose", "code")))
    artifacts = calibrated.run()
    rows = artifacts.meta["measured"]
    assert [row["quality"] for row in rows] == [25, 35, 45]
    assert rows[0]["kl"] > rows[2]["kl"] > 0
    assert rows[0]["ratio"] > rows[2]["ratio"] > 1
    assert artifacts.meta["model_fingerprint"] == lm.fingerprint(model)
    dump = lm.dump(model, calibrated.stretches[0].tokens)
    codec = CacheCodec(artifacts)
    assert codec.decompress_dump(codec.compress_dump(dump)).tokens.tolist() == dump.tokens.tolist()
    slots = live_slots(cache_spec(model))
    assert Tables.from_json(artifacts.meta["klt"], slots).layers.keys() == slots.keys()
    calibrated.finish()
    assert os.listdir(work.work_home()) == []


def test_a_method_with_one_ratio_is_measured_at_it(llama):
    calibrated = prepared(llama, texts=some_texts(60), config=codec_config("kvtc-4"))
    (row,) = calibrated.run().meta["measured"]
    assert row["quality"] is None
    assert row["ratio"] > 1


def test_an_interrupted_calibration_goes_on_and_ends_with_the_same_artifacts(llama):
    class Interrupted(calibration.Calibration):
        def _dump(self, stretch, index):
            if index == 3:
                raise KeyboardInterrupt
            return super()._dump(stretch, index)

    texts = some_texts(80)
    with pytest.raises(KeyboardInterrupt):
        prepared(llama, Interrupted, texts).run()
    resumed = prepared(llama, texts=texts)
    count = resumed._collect()
    assert resumed.resumed == 3
    assert len(resumed._seconds) == len(resumed.stretches) - 3
    found = resumed._learn(count)
    resumed.finish()
    whole = prepared(llama, texts=texts)
    assert found.fingerprint == whole._learn(whole._collect()).fingerprint


def damaged(path):
    path.write_bytes(path.read_bytes()[:-40])


def of_other_tokens(path):
    path.write_bytes(path.with_name("00001.npz").read_bytes())


def without_sensitivity(path):
    dump = work.read_dump(path)
    work.write_dump(path, replace(dump, sensitivity={}))


def of_another_model(path):
    work.write_dump(path, replace(work.read_dump(path), fingerprint="f00d.cafe"))


def enormous(path):
    os.truncate(path, 2**40)  # sparse: it takes no space


def a_link(path):
    outside = path.parents[3] / "outside"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


def a_folder(path):
    path.unlink()
    (path / "inside").mkdir(parents=True)


@pytest.mark.parametrize(
    "spoil", [damaged, of_other_tokens, without_sensitivity, of_another_model, enormous, a_link, a_folder]
)
def test_a_stretch_that_is_not_what_it_should_be_is_run_again(llama, spoil):
    first = prepared(llama, texts=some_texts(60))
    count = first._collect()
    first.work.close()
    spoil(first.work.path(0))
    (first.work.folder / "litter").write_text("no stretch")
    again = prepared(llama, texts=some_texts(60))
    assert again.work.finished() == set(range(1, count))
    assert again._collect() == count
    assert again.work.finished() == set(range(count))
    outside = first.work.folder.parents[2] / "outside"
    assert outside.exists() == (spoil is a_link)
    assert len(os.listdir(first.work.folder)) == count


def test_a_folder_that_leads_elsewhere_is_refused(llama, home, tmp_path):
    first = prepared(llama)
    first.work.remove()
    first.work.folder.symlink_to(tmp_path)
    with pytest.raises(InputError, match="should be a folder of mlxkv"):
        prepared(llama)


def test_two_processes_do_not_calibrate_the_same_at_once(llama):
    first = prepared(llama)
    with pytest.raises(InputError, match="at work on this model already"):
        prepared(llama)
    first.work.close()
    prepared(llama).work.close()


def test_work_that_no_one_went_on_with_for_a_week_is_removed(llama):
    old, new = work.work_home() / ("0" * 32), work.work_home() / ("1" * 32)
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    prepared(llama)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(("seconds", "most"), [(1, 7), (150, 11), (1e6, 99)])
def test_as_many_stretches_are_run_as_the_budget_has_time_for_and_never_too_few(llama, seconds, most):
    texts = some_texts(words=450, each=2)
    calibrated = prepared(llama, Timed, texts, seconds=seconds, clock=Clock())
    count = calibrated._collect()
    if most == 99:
        assert count == len(calibrated.stretches) > 20
    else:
        tokens = np.cumsum([len(stretch.tokens) for stretch in calibrated.stretches])
        assert tokens[count - 1] >= budget.USEFUL_TOKENS
        assert count <= most
        assert seconds == 1 or calibrated.budget.elapsed + 3.0 * count <= seconds


def test_what_it_takes_is_said_before_and_again_when_the_speed_is_known(llama):
    plans, shares = [], []
    reports = calibration.Reports(lambda what, share: shares.append(share), plans.append)
    calibrated = prepared(llama, Timed, some_texts(60), seconds=1e4, clock=Clock(), reports=reports)
    calibrated._collect()
    assert [plan.stretches for plan in plans] == [len(calibrated.stretches)] * 2
    assert plans[0].seconds == 0
    assert plans[1].seconds == calibrated.budget.elapsed + 3.0 * len(calibrated.stretches)
    size = sum(path.stat().st_size for path in calibrated.work.folder.iterdir())
    assert plans[1].disk_bytes == pytest.approx(size, rel=0.2)
    assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize(("seconds", "stretches"), [(1, 2), (45, 4), (1e6, 12)])
def test_costs_for_live_caches_are_measured_on_as_many_stretches_as_time_allows(llama, monkeypatch, seconds, stretches):
    counted = []

    def measure(costs, model, dump):
        counted.append(dump.tokens)
        clock.now += 10

    clock = Clock()
    calibrated = prepared(llama, texts=some_texts(words=80, each=6), seconds=seconds, clock=clock)
    monkeypatch.setattr(run.Costs, "measure", measure)
    monkeypatch.setattr(calibrated, "_measuring", lambda texts: 0.0)
    artifacts = calibrated._learn(calibrated._collect())
    calibrated._cost(artifacts, len(calibrated.stretches))
    assert len(counted) == stretches < len(calibrated.stretches)


def test_a_model_without_live_caches_is_calibrated_all_the_same(llama, monkeypatch):
    def measure(costs, model, dump):
        raise UnsupportedError("it chooses tokens by their index")

    monkeypatch.setattr(run.Costs, "measure", measure)
    artifacts = prepared(llama, texts=some_texts(60)).run()
    assert artifacts.meta["measured"]
    assert "klt" not in artifacts.meta


def test_rows_in_memory_are_bounded_whatever_the_texts(llama):
    spec = cache_spec(llama)
    width = spec.stream("k").width
    most = budget.most_stretches(spec, [10**7] * 1000)
    assert 4 * width * 10**7 * most <= budget.MAX_ROWS_BYTES < 4 * width * 10**7 * (most + 1)
    assert budget.most_stretches(spec, [10**12]) == 1


def test_the_page_says_what_is_computed_for_a_model_of_8_billion_weights():
    pair = Slot("keys", 8, 128, Rope(128, base=1e6)), Slot("values", 8, 128)
    qwen = CacheSpec("qwen3", (pair,) * 36)
    lengths = [STRETCH_TOKENS] * 100
    count = budget.most_stretches(qwen, lengths)
    tokens = count * STRETCH_TOKENS
    page = (Path(__file__).parents[2] / "docs" / "calibrate.md").read_text()
    assert f"| tokens, at most | {tokens:,} |" in page
    assert f"| memory beside the model's | {budget.memory_bytes(qwen, tokens) / 1e9:.1f} GB |" in page
    assert f"| disk while it lasts | {budget.disk_bytes(qwen, lengths[:count]) / 1e9:.1f} GB |" in page
    assert 60 <= budget.training_seconds(qwen, tokens, 1e12) < budget.training_seconds(qwen, tokens, 5e11) <= 140


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_budget_is_a_time(llama, seconds):
    with pytest.raises(InputError, match="minutes above 0"):
        prepared(llama, seconds=seconds)


def test_bad_numbers_are_told_in_plain_words(llama):
    artifacts = prepared(llama, texts=some_texts(60)).run()
    told = worth.warning(artifacts, artifacts.meta["measured"])
    row = {"quality": 35, "kl": 1.0, "worst_kind": "code"}
    assert "most for code" in worth.warning(artifacts, [row])
    fine = worth.warning(replace(artifacts, meta={**artifacts.meta, "held_out_error": {}}), [{**row, "kl": 0.001}])
    assert fine is None
    assert "too little text" in worth.warning(artifacts, [])
    few = {**artifacts.meta, "calibration_tokens": 10}
    assert "10 tokens are few" in worth.warning(replace(artifacts, meta=few), [row])
    worse = {**artifacts.meta, "held_out_error": {"k": 0.3}, "trained_error": {"k": 0.1}}
    assert "3.0 times less exactly" in worth.warning(replace(artifacts, meta=worse), [row])
    assert artifacts.meta.get("warning") == told


def test_texts_without_anything_to_hold_out_are_learnt_from_with_a_warning(llama):
    artifacts = prepared(llama, texts=[Text("a", "prose", sentences(60, 0), None)]).run()
    assert artifacts.meta["measured"] == []
    assert "too little text" in artifacts.meta["warning"]

"""Artifacts learnt from a store's own prompts: in short steps, which leave nothing behind, and only if they are worth it."""

import gc
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokens
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from zoo.build import build

from mlxkv import lm
from mlxkv.calibration import budget, gradual, training, work, worth
from mlxkv.calibration.model_work import ModelWork
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.dump import read_dump
from mlxkv.models import cache_spec
from mlxkv.store.learning import Learning

MODELS = ("llama", "lfm2", "glm4_moe_lite", "gemma3_text")  # rotated keys, states, MLA, windows
NUMBERS = {"kind": "own prompts", "quality": 38, "kl": 0.001, "ratio": 10.0}
PROMPTS = [tiny_tokens(110, seed=seed) for seed in range(6)]


class InThisProcess:
    """What `Training` does, without a process, and once for each model."""

    made, learnt = (), {}

    def __init__(self, folder, count, config, *, gentle):
        assert gentle
        self.files, self.config = [folder / f"{index:05d}.npz" for index in range(count)], config
        self.folder, self.polls, self.stopped = folder, 2, False
        InThisProcess.made += (self,)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped = True

    def ended(self):
        self.polls -= 1
        return self.polls < 0

    def result(self):
        model = read_dump(self.files[0]).fingerprint
        if model not in self.learnt:
            self.learnt[model] = training.train(self.files, self.config)
        self.learnt[model].save(self.folder / training.LEARNT)
        return CalibrationArtifacts.from_dir(self.folder / training.LEARNT)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch, request):
    """A home of its own, plenty of memory, no process of its own, and artifacts that are worth it."""
    monkeypatch.setenv("MLXKV_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gradual, "_free_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(gradual, "_POLL_SECONDS", 0)
    monkeypatch.setattr(gradual, "SIZES", (48, 96))
    monkeypatch.setattr(gradual, "Training", InThisProcess)
    monkeypatch.setattr(worth, "refusal", lambda learnt, free: None)
    if "really_measured" not in request.fixturenames:
        monkeypatch.setattr(worth, "measuring", lambda model, codecs, text, fingerprint: iter([None, NUMBERS, NUMBERS]))
    monkeypatch.setattr(InThisProcess, "made", ())


@pytest.fixture(scope="module")
def models():
    return {name: build(name) if name == "gemma3_text" else tiny_model(name) for name in MODELS}


@pytest.fixture
def llama(models):
    return models["llama"]


@pytest.fixture
def really_measured():
    """What is learnt is measured, which takes longer than all else."""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def learning(model, texts=PROMPTS, got=None, **settings):
    settings = {"least_tokens": 400, "most_tokens": 360, **settings}
    return Learning(
        model, name="a/model", fingerprint=lm.fingerprint(model), spec=cache_spec(model), prompts=lambda: iter(texts),
        ready=(got if got is not None else []).append, **settings,
    )  # fmt: skip


def until(it, state):
    """Go on until this is being done."""
    while it.statistics()["state"] != state:
        assert it.step(), it.statistics()
    return it


def finish(it):
    while it.step():
        pass
    return it.statistics()


def told(model):
    """What a model says of some tokens, bit for bit, and all that its modules are."""
    logits = model(mx.array([PROMPTS[0][:40]]), cache=make_prompt_cache(model))
    modules = [(id(part), part.training) for part in model.modules()]
    return np.array(logits).tobytes(), modules, [id(array) for _, array in tree_flatten(model.parameters())]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("really_measured")
def test_artifacts_are_learnt_from_prompts_and_the_model_is_the_same_after_every_step(models, name):
    model, got = models[name], []
    before = told(model)
    state = np.array(mx.random.state[0]).tobytes()
    it = learning(model, got=got)
    states = []
    while it.step():
        assert told(model) == before
        states += [it.statistics()["state"]]
    assert list(dict.fromkeys(states)) == ["waiting", "running", "training", "measuring"]
    assert np.array(mx.random.state[0]).tobytes() == state
    (artifacts,) = got
    assert library.find(lm.fingerprint(model), "kvtc-rd", cache_spec(model)).fingerprint == artifacts.fingerprint
    assert it.statistics()["state"] == "learnt"
    assert it.statistics()["artifacts"] == artifacts.fingerprint
    assert artifacts.meta["learnt_from"] == "own prompts"
    assert artifacts.meta["measured"][0]["quality"] == 39.5
    assert artifacts.meta["measured"][0]["kl"] > 0
    assert list((work.work_home()).iterdir()) == []


@pytest.mark.parametrize(("where", "name"), [("prefill", "lfm2"), *(("model", name) for name in MODELS)])
def test_an_interrupted_step_leaves_the_model_as_it_was_and_is_done_again(models, name, where, monkeypatch):
    model = models[name]
    before = told(model)
    it = until(learning(model), "running")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "prefill":
            patch.setattr(gradual.lm, "prefill", interrupted)
        else:  # in the middle of the gradients
            patch.setattr("mlxkv.sensitivity.nn.losses.cross_entropy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(it)
    assert told(model) == before
    until(it, "training")


@pytest.mark.usefixtures("really_measured")
def test_no_memory_of_mlx_is_left_after_a_step(llama):
    it = until(learning(llama), "running")
    gc.collect()
    before, seen = mx.get_active_memory(), []
    while it.step():
        seen += [mx.get_active_memory() - before]
        assert mx.get_cache_memory() == 0
    it.close()
    del it
    gc.collect()
    assert max(seen) < 2**20  # a cache of part of a stretch, between two steps
    assert mx.get_active_memory() - before < 2**16


def test_nothing_of_the_texts_is_in_the_artifacts(llama):
    it = learning(llama)
    until(it, "training")
    names = [path.name for path in work.work_home().glob("*/*")]
    finish(it)
    (item,) = library.items()
    meta = (item.folder / "meta.json").read_text()
    numbers = json.loads(meta)
    assert not [value for value in numbers.values() if isinstance(value, list) and len(value) > 16]
    assert str(PROMPTS[0][64:68])[1:-1] not in meta
    assert {path.suffix for path in item.folder.iterdir()} == {".npy", ".json"}
    assert set(names) <= {"plan.json", *(f"{i:05d}.npz" for i in range(20))}


def test_the_folder_of_unfinished_work_is_of_the_user_alone(llama):
    until(learning(llama), "training")
    (folder,) = work.work_home().iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "texts",
    [
        [],
        PROMPTS[:2],
        [PROMPTS[0][: 80 + 5 * i] for i in range(6)],  # one conversation
        [[*PROMPTS[0], *tiny_tokens(70, seed=i)] for i in range(20, 23)],  # branches of one
        [[96 + token for token in prompt] for prompt in PROMPTS],  # beyond the vocabulary
        [[-1, *prompt] for prompt in PROMPTS],
    ],
)
def test_it_waits_until_there_are_enough_prompts_that_differ(llama, texts):
    clock = Clock()
    it = learning(llama, texts, clock=clock)
    assert not it.step()
    assert it.statistics()["state"] == "waiting"
    texts[:] = PROMPTS
    assert not it.step()  # it does not look all the time
    clock.now += 1_000
    assert it.step()


@pytest.mark.parametrize("state", ["running", "training", "measuring"])
def test_another_process_goes_on_where_one_ended(llama, state, monkeypatch):
    first = until(learning(llama), state)
    while state == "running" and first.statistics()["stretches"] < 2:
        first.step()
    first.close()
    assert not first.step()
    (folder,) = work.work_home().iterdir()
    finished = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    got = []
    second = learning(llama, texts=[], got=got)  # the choice of texts is kept as well
    until(second, "measuring")
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}.items()
    finish(second)
    assert len(got) == 1
    assert len(InThisProcess.made) == 1 + (state == "training")


def test_of_two_servers_one_works_and_the_other_is_told_of_what_it_learnt(llama):
    clock, got = Clock(), []
    first, second = learning(llama), learning(llama, got=got, clock=clock)
    until(first, "running")
    assert not second.step()
    assert "at work on this model already" in second.statistics()["reason"]
    finish(first)
    assert got == []
    clock.now += 1_000
    assert not second.step()
    assert [artifacts.fingerprint for artifacts in got] == [first.statistics()["artifacts"]]
    assert second.statistics()["state"] == "learnt"


def test_after_success_it_stops_until_the_artifacts_are_removed(llama):
    clock, got = Clock(), []
    it = learning(llama, got=got, clock=clock)
    finish(it)
    clock.now += 10_000
    assert not it.step()
    assert not learning(llama, got=got).step()
    assert len(got) == 1
    library.remove(got[0].fingerprint)
    clock.now += 10_000
    finish(it)
    assert len(got) == 2


def test_what_is_not_worth_it_is_not_used_and_that_is_said_and_remembered(llama, monkeypatch):
    monkeypatch.setattr(worth, "refusal", lambda learnt, free: "predictions differ")
    got = []
    told = finish(learning(llama, got=got))
    assert (told["state"], told["reason"]) == ("given up", "predictions differ")
    assert got == library.items() == []
    again = learning(llama)
    assert not again.step()
    assert again.statistics()["reason"] == "predictions differ"
    (folder,) = work.work_home().iterdir()
    assert [path.name for path in folder.iterdir()] == ["plan.json"]
    state = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**state, "at": state["at"] - 8 * 24 * 3600}))
    assert learning(llama).step()  # a week later


def test_too_little_memory_or_disk_is_waited_for_and_counted(llama, monkeypatch):
    clock = Clock()
    it = learning(llama, clock=clock)
    for count, free in enumerate((10**6, 2 * 10**9), start=1):
        monkeypatch.setattr(gradual, "_free_memory", lambda free=free: free)
        monkeypatch.setattr(budget, "memory_bytes", lambda spec, tokens: 10**10)
        told = finish(it)
        assert told["state"] == "waiting"
        assert "memory" in told["reason"]
        assert told["skipped"] == count
        clock.now += 10_000


def test_less_memory_means_fewer_stretches(llama, monkeypatch):
    monkeypatch.setattr(budget, "USEFUL_TOKENS", 100)
    monkeypatch.setattr(budget, "memory_bytes", lambda spec, tokens: tokens * 2 * 10**7)
    told = until(learning(llama), "training").statistics()
    assert 100 <= told["tokens"] <= 175
    assert told["stretches"] == told["stretches_wanted"] == 3


def test_steps_that_are_too_slow_are_not_made_and_tried_less_and_less_often(llama, monkeypatch):
    monkeypatch.setattr(gradual, "STEP_SECONDS", 0)
    clock, tried = Clock(), 0
    it = learning(llama, clock=clock)
    for clock.now in range(0, 10_000, 100):
        before = it.statistics()["skipped"]
        told = finish(it)
        tried += told["skipped"] > before
        assert told["state"] == "waiting"
    assert "requests would have to wait" in told["reason"]
    assert 2 <= tried <= 5


def test_after_a_slow_step_it_pauses_and_goes_on_from_there(llama, monkeypatch):
    clock = Clock()
    it = until(learning(llama, clock=clock), "running")
    with monkeypatch.context() as patch:
        patch.setattr(gradual, "STEP_SECONDS", 0)
        assert not it.step()
        assert not it.step()
    assert it.statistics()["state"] == "running"
    clock.now += 1_000
    assert it.step()


def test_the_whole_is_bounded_in_time(llama, monkeypatch):
    told = finish(learning(llama, seconds=0))
    assert told["state"] == "given up"
    assert "too slow" in told["reason"]
    monkeypatch.setattr(budget, "USEFUL_TOKENS", 40)
    (folder,) = work.work_home().iterdir()
    (folder / "plan.json").unlink()
    it = learning(llama)
    while it.statistics()["stretches"] == 0:
        assert it.step()
    it._gradual.spent = 1e6
    told = until(it, "training").statistics()
    assert 40 <= told["tokens"] < told["tokens_wanted"]


def test_a_server_that_is_killed_again_and_again_in_the_middle_of_a_step_no_longer_tries(llama):
    for _ in range(3):
        it = until(learning(llama), "running")
        it.close()
        (folder,) = work.work_home().iterdir()
        (folder / "running").touch()
    it = learning(llama)
    assert not it.step()
    assert "killed 3 times" in it.statistics()["reason"]


def test_errors_do_not_reach_the_server_and_end_it_after_a_few(llama, monkeypatch):
    def broken():
        raise OSError("no such store")

    clock = Clock()
    it = learning(llama, clock=clock)
    it._prompts = broken
    for _ in range(3):
        assert not it.step()
        clock.now += 10_000
    assert it.statistics()["state"] == "given up"
    assert "no such store" in it.statistics()["reason"]
    it._prompts = lambda: iter(PROMPTS)
    assert not it.step()


@pytest.mark.parametrize(
    "state",
    [
        [],
        {"trained": 3, "held_out": []},
        {"trained": [["prose", [1] * 5]], "held_out": [["prose", [1] * 50]]},
        {"trained": [["prose", [1] * 5_000]], "held_out": [["prose", [1] * 50]]},
        {"trained": [[["prose"], [1] * 50]], "held_out": [["prose", [1] * 50]]},
        {"trained": [["prose", [1, 2.5] * 25]], "held_out": [["prose", [1] * 50]]},
        {"trained": [["prose", [-1] * 50]], "held_out": [["prose", [1] * 50]]},
        {"trained": [["prose", [1] * 50]], "held_out": [["prose", [10**6] * 50]]},  # beyond the vocabulary
        {"given_up": "forged", "at": "now", "deaths": "many"},
    ],
)
def test_a_forged_choice_of_texts_is_none(llama, state):
    own = ModelWork(lm.fingerprint(llama), cache_spec(llama))
    (own.folder / "plan.json").write_text(json.dumps(state))
    own.close()
    until(it := learning(llama), "running")
    assert it.statistics()["tokens_wanted"] > 100


def test_closing_ends_the_process_that_learns(llama):
    it = until(learning(llama), "training")
    it.step()
    it.close()
    assert InThisProcess.made[0].stopped
    it.close()

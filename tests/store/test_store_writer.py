"""What is stored is written after the work that people wait for: one job after another, within bounds, and up to the end."""

import errno
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from stored import computed, run, stored

from mlxkv import Store
from mlxkv.errors import InputError
from mlxkv.store.form import form_of
from mlxkv.store.growth import Growth
from mlxkv.store.writer import Job, Stopped, Writer


@dataclass
class Note(Job):
    """A job that says what becomes of it, and waits for a gate where it has one."""

    name: str
    said: list
    nbytes: int = 1
    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    pauses: int = 1

    def merged(self, other):
        return self if other.name == self.name else None

    def write(self, pause):
        self.begun.set()
        self.gate.wait(60)
        for _ in range(self.pauses):
            pause()
        self.said.append(self.name)

    def dropped(self):
        self.said.append(f"no {self.name}")


@pytest.fixture
def said():
    return []


def opened(*jobs):
    for job in jobs:
        job.gate.set()
    return jobs


def test_jobs_are_done_in_order_and_flush_waits_for_them(said):
    writer = Writer()
    for job in opened(*(Note(name, said) for name in "abc")):
        writer.add(job)
    assert writer.flush(60)
    assert said == ["a", "b", "c"]
    assert writer.waiting == (0, 0)
    assert writer.close(60)


def test_a_job_that_does_the_work_of_one_that_waits_takes_its_place(said):
    writer, first = Writer(), Note("first", said)
    writer.add(first)
    assert first.begun.wait(60)
    for job in opened(*(Note(name, said) for name in ("same", "other", "same", "first"))):
        writer.add(job)
    assert writer.waiting[0] == 4  # one that is begun stays
    first.gate.set()
    assert writer.close(60)
    assert said == ["first", "other", "same", "first"]


def test_the_oldest_jobs_are_dropped_when_too_many_bytes_wait_but_never_the_newest(said):
    writer, first = Writer(most_bytes=10), Note("first", said)
    writer.add(first)
    assert first.begun.wait(60)
    for job in opened(Note("a", said, 6), Note("b", said, 6), Note("c", said, 4), Note("d", said, 100)):
        writer.add(job)
    first.gate.set()
    assert writer.close(60)
    assert said == ["no a", "no b", "no c", "first", "d"]


def test_writing_waits_while_requests_run_and_not_when_someone_waits_for_it(said):
    asked = threading.Event()

    def busy():
        asked.set()
        return True

    writer = Writer(busy)
    writer.add(*opened(Note("a", said)))
    assert asked.wait(60)
    assert not said
    assert writer.flush(60)
    assert said == ["a"]
    writer.close()


def test_writing_does_not_wait_for_ever(said, monkeypatch):
    monkeypatch.setattr("mlxkv.store.writer.MOST_PAUSE", 0.01)
    writer, done = Writer(lambda: True), Note("a", said)
    done.gate.set()
    writer.add(done)
    with writer._changed:
        assert writer._changed.wait_for(lambda: said, 60)
    writer.close()


@pytest.mark.parametrize(("taken", "waited", "expected"), [
    (0, 0, 4), (25, 0, 2), (50, 0, 0), (100, 0, 0), (0, 30, 2), (0, 60, 0), (0, 90, 0), (25, 15, 2), (10, 45, 1),
])  # fmt: skip
def test_writing_waits_the_less_for_requests_the_more_waits_and_the_longer(said, taken, waited, expected):
    times = [100.0]
    writer, first = Writer(lambda: True, 100, lambda: times[0]), Note("first", said, 0)
    writer.add(first)
    assert first.begun.wait(60)
    writer.add(*opened(Note("a", said, taken)))
    times[0] += waited
    writer.add(*opened(Note("a", said, taken)))  # the work of one that has waited
    assert writer._patience() == pytest.approx(expected)
    first.gate.set()
    assert writer.close(60)
    assert writer._patience() == 0


def test_of_a_shutdown_no_block_waits(said):
    """Requests run on and on, and seconds of the clock do not pass: a single pause would never end."""
    writer, many = Writer(lambda: True, clock=lambda: 0.0), Note("many", said, pauses=1000)
    writer.add(*opened(many))
    assert many.begun.wait(60)
    assert writer.close(60)
    assert said == ["many"]


def test_closing_ends_between_two_blocks_and_drops_what_is_not_begun(said):
    writer, first = Writer(), Note("first", said, pauses=2)
    writer.add(first)
    assert first.begun.wait(60)
    writer.add(*opened(Note("second", said)))
    threading.Timer(0.2, first.gate.set).start()
    assert not writer.close(0.01)
    assert said == ["no second", "no first"]
    writer.add(*opened(Note("late", said)))
    assert said[-1] == "no late"
    with pytest.raises(Stopped):
        writer._pause()


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", limit=10**9) as made:
        yield made


def test_a_longer_text_takes_the_place_of_its_beginning_and_keeps_where_that_ended(store):
    model, ids = tiny_model("llama"), tiny_tokens(300)
    prompts = store.for_model(model, quality=70)
    with store._writer._changed:  # the writer waits
        for end in (100, 300, 200):
            prompts.insert(ids[:end], computed(model, ids[:end]), "user" if end < 300 else "assistant")
        assert store._writer.waiting[0] == 1
    assert prompts.flush(60)
    assert [(entry.tokens, entry.kind) for entry in store.blocks.entries()][::-1] == [
        (100, "user"), (200, "user"), (300, "assistant"),
    ]  # fmt: skip
    assert prompts.statistics()["tokens_written"] == 300


def test_texts_that_cannot_be_cut_wait_each_for_itself(store):
    model, ids = tiny_model("lfm2"), tiny_tokens(300)
    prompts = store.for_model(model)
    with store._writer._changed:
        for end in (100, 300):
            prompts.insert(ids[:end], computed(model, ids[:end]))
    assert prompts.flush(60)
    assert {prompts.match(ids[:200]), prompts.match([*ids, 1])} == {100, 300}


def _full(self, block, data):
    raise InputError(f"cannot write to the store: {os.strerror(errno.ENOSPC)}")


def test_a_full_disk_is_counted_and_logged_once_and_generation_goes_on(store, monkeypatch, caplog):
    model, ids = tiny_model("llama"), tiny_tokens(200)
    prompts = store.for_model(model)
    with monkeypatch.context() as patch:
        patch.setattr(Growth, "put", _full)
        for seed in range(3):
            stored(prompts, model, tiny_tokens(100, seed=seed))
    assert prompts.statistics()["errors"] == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    stored(prompts, model, ids)
    assert prompts.match(ids) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_counted_and_later_prompts_are_stored(store, value):
    model, ids = tiny_model("llama"), tiny_tokens(100)
    prompts = store.for_model(model)
    cache = computed(model, ids)
    cache[0].keys = cache[0].keys + value
    prompts.insert(ids, cache)
    assert prompts.flush(60)
    assert prompts.statistics()["errors"] == 1
    stored(prompts, model, ids)
    assert prompts.match(ids) > 0


def test_a_prompt_larger_than_the_store_is_counted_as_skipped(tmp_path):
    model = tiny_model("llama", hidden_size=256, head_dim=128, num_key_value_heads=4)
    ids = tiny_tokens(1000)
    with Store(tmp_path / "store", limit=2**22) as store:
        prompts = store.for_model(model, exact=True)
        stored(prompts, model, ids)
        found = prompts.statistics()
        assert found["store"]["taken"] <= 2**22
        assert prompts.match(ids) < 1000


def test_a_cache_is_coded_while_another_thread_runs_the_model(store):
    model, ids = tiny_model("llama"), tiny_tokens(600)
    prompts = store.for_model(model, exact=True)
    prompts.insert(ids, cache := computed(model, ids))
    expected = run(model, computed(model, ids[:60]), ids[60:160], 1)
    while store._writer.waiting[0]:
        assert mx.array_equal(run(model, computed(model, ids[:60]), ids[60:160], 1), expected)
    assert prompts.fetch([*ids, 1]).length == 600
    assert cache[0].offset == 600


def test_a_process_that_ends_in_the_middle_leaves_whole_blocks(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(os.path.dirname(os.path.dirname(__file__)))!r})
from conftest import tiny_model, tiny_tokens
from stored import computed
from mlxkv import Store
store = Store({str(tmp_path / "store")!r}, limit=10**9, busy=lambda: bool(store.blocks.statistics().blocks))
model, ids = tiny_model("llama"), tiny_tokens(1100)
prompts = store.for_model(model, quality=70)
prompts.insert(ids, computed(model, ids))
while not store.blocks.statistics().blocks: pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "prompts are not stored that came faster than they could be written, or before the end"
    ]
    with Store(tmp_path / "store") as store:
        model, ids = tiny_model("llama"), tiny_tokens(1100)
        prompts = store.for_model(model, quality=70)
        assert prompts.match(ids) in (512, 1024)
        assert prompts.fetch(ids).length == prompts.match(ids)
        assert not list(store.blocks.folder.path.rglob("*.part*"))


def test_the_form_of_a_cache_is_known_without_computing_anything():
    model = tiny_model("llama")
    before = mx.get_active_memory()
    form = form_of(model)
    assert (form.dtype, form.window, form.states, form.cut_anywhere) == ("float32", 0, False, True)
    assert mx.get_active_memory() - before < 2**20

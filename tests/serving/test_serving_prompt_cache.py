"""The server's prompt cache: what comes from RAM, what from disk, what is left to compute, and what is handed to the store."""

import logging
import time
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlxkv.errors import InputError
from mlxkv.serving import prompt_cache as module
from mlxkv.serving.prompt_cache import LEAST_TOKENS, PromptCache
from mlxkv.serving.speeds import LEAST_GAIN

TEXT = list(range(1000, 2000))


def rows(tokens, kind=KVCache, **more):
    """A prompt cache of one layer that holds so many tokens."""
    cache = kind(**more)
    part = mx.arange(tokens, dtype=mx.float32).reshape(1, 1, tokens, 1)
    cache.update_and_fetch(part, part)
    return [cache]


class Disk:
    """A store that has the beginning of a text, and writes down what it is asked."""

    def __init__(self, length=0, kind=KVCache, **more):
        self.length, self.kind, self.more = length, kind, more
        self.matches = self.fetches = 0
        self.inserted, self.seconds, self.flushed = [], 0.0, 0
        self.facts = {"tokens_written": 0, "bytes_written": 0, "waiting": 0, "coding": "exact"}

    def match(self, tokens):
        self.matches += 1
        return self.length

    def fetch(self, tokens):
        self.fetches += 1
        time.sleep(self.seconds)
        return SimpleNamespace(cache=rows(self.length, self.kind, **self.more), length=self.length, bytes=77)

    def insert(self, tokens, cache, kind="assistant", cuts=()):
        self.inserted.append((list(tokens), kind, list(cuts)))

    def statistics(self):
        return self.facts

    def flush(self, timeout=None):
        self.flushed += 1
        return True


def prompts(disk=None, **more):
    made = PromptCache(**more)
    made.keep_on_disk("model", disk)
    return made


def found(made, tokens, model="model"):
    """How many tokens need not be computed; the cache holds just them."""
    cache, rest = made.fetch_nearest_cache(model, tokens)
    assert rest == tokens[len(tokens) - len(rest) :]
    assert rest or not tokens
    assert (cache[0].offset if cache else 0) == len(tokens) - len(rest)
    return len(tokens) - len(rest)


@pytest.mark.parametrize("tokens", [[], [1], TEXT[:2], TEXT])
def test_with_nothing_kept_everything_is_computed(tokens):
    for disk in (None, Disk()):
        cache, rest = prompts(disk).fetch_nearest_cache("model", tokens)
        assert cache is None
        assert rest == tokens


@pytest.mark.parametrize("kind", [{}, {"kind": RotatingKVCache, "max_size": 300}])
@pytest.mark.parametrize("length", [1, 100, 1000])
def test_a_prompt_that_is_kept_whole_leaves_a_token_to_compute(kind, length):
    made = prompts()
    made.insert_cache("model", TEXT[:length], rows(length, **kind))
    rotated = bool(kind) and length >= kind["max_size"]
    assert found(made, TEXT[:length]) == (0 if rotated else length - 1)
    assert found(made, [*TEXT[:length], 7]) == length


@pytest.mark.parametrize(("in_memory", "on_disk", "expected"), [
    (0, LEAST_GAIN - 1, 0), (0, LEAST_GAIN, LEAST_GAIN), (500, 500 + LEAST_GAIN - 1, 500), (500, 400, 500),
    (500, 570, 500), (500, 580, 580), (900, 999, 900), (0, 999, 999),
])  # fmt: skip
def test_a_disk_is_read_where_it_brings_clearly_more(in_memory, on_disk, expected):
    disk = Disk(on_disk)
    made = prompts(disk)
    if in_memory:
        made.insert_cache("model", TEXT[:in_memory], rows(in_memory))
    assert found(made, TEXT) == expected
    assert disk.fetches == (expected == on_disk)


def test_a_disk_is_not_asked_where_it_could_bring_little():
    disk = Disk(10)
    made = prompts(disk)
    made.insert_cache("model", TEXT, rows(len(TEXT)))
    assert found(made, TEXT[:LEAST_GAIN]) == LEAST_GAIN - 1
    assert found(made, [*TEXT, *range(LEAST_GAIN)]) == len(TEXT)
    assert found(made, list(range(LEAST_GAIN))) == 0
    assert disk.matches == 0


def test_what_came_from_disk_is_in_memory_for_others():
    disk = Disk(800)
    made = prompts(disk)
    assert found(made, TEXT) == found(made, [*TEXT[:800], 5, 5]) == 800
    assert disk.fetches == 1
    assert made.stats_by_type()["user"]["n_sequences"] == 1


@pytest.mark.parametrize(("kind", "expected"), [({}, 999), ({"kind": RotatingKVCache, "max_size": 300}, 0)])
def test_a_disk_that_brings_a_whole_prompt_leaves_a_token_to_compute(kind, expected):
    assert found(prompts(Disk(1000, **kind)), TEXT) == expected


def test_what_is_too_large_for_memory_is_read_for_its_request_alone():
    disk = Disk(800)
    made = prompts(disk, max_bytes=100)
    assert found(made, TEXT) == found(made, TEXT) == 800
    assert disk.fetches == 2
    assert len(made) == 0


@pytest.mark.parametrize(("computing", "reading", "expected"), [(0.0, 0.02, 0), (0.02, 0.0, 800)])
def test_a_disk_is_read_while_that_is_faster_than_computing(computing, reading, expected):
    disk = Disk(800)
    disk.seconds = reading
    made = prompts(disk, max_bytes=100)  # so that nothing stays in memory
    for _ in range(2):
        assert found(made, TEXT) == 800
        made.fetch_nearest_cache("another", TEXT)
        time.sleep(computing)
        made.computed(len(TEXT))
    assert found(made, TEXT) == expected
    made.keep_on_disk("model", Disk(900))  # of which nothing is known
    assert found(made, TEXT) == 900


def test_what_waits_is_written_at_the_end_whatever_model_was_served_last():
    for after in ([("model", old := Disk())], [(None, None)], [(None, None), ("another", new := Disk())]):
        made = prompts(old)
        made.insert_cache("model", TEXT, rows(len(TEXT)))
        for model, disk in after:
            made.keep_on_disk(model, disk)
        before = old.flushed
        assert made.flush(1)
        assert (old.flushed - before, new.flushed if len(after) > 1 else 0) == ((0, 1) if len(after) > 1 else (1, 0))


def test_a_disk_that_fails_is_a_miss(caplog):
    disk = Disk()
    disk.match = lambda tokens: (_ for _ in ()).throw(InputError("the index is gone"))
    assert found(prompts(disk), TEXT) == 0
    assert "the index is gone" in caplog.text
    disk = Disk(500)
    disk.fetch = lambda tokens: None
    assert found(prompts(disk), TEXT) == 0


def test_ends_of_prompts_are_places_to_go_on_from():
    disk = Disk()
    made = prompts(disk)
    for length in (300, 500, 900):
        made.fetch_nearest_cache("model", TEXT[:length])
    made.fetch_nearest_cache("another", TEXT[:400])
    made.insert_cache("model", TEXT[:299], rows(299), cache_type="system")
    made.insert_cache("model", TEXT[:600], rows(600))
    made.insert_cache("model", TEXT[:700], rows(700))
    made.insert_cache("model", TEXT, rows(1000))
    assert [(len(tokens), kind, cuts) for tokens, kind, cuts in disk.inserted] == [
        (299, "system", []), (600, "assistant", [300, 500]), (700, "assistant", []), (1000, "assistant", [900]),
    ]  # fmt: skip


def test_prompts_whose_answers_never_come_are_forgotten():
    made = prompts(Disk())
    for _ in range(1000):
        made.fetch_nearest_cache("model", TEXT[:5])
    assert len(made._asked) < 200


@pytest.mark.parametrize("tokens", [TEXT[: LEAST_TOKENS - 1], [*TEXT, -(2**59)]], ids=["short", "with an image"])
def test_what_no_disk_should_have_stays_in_memory(tokens):
    disk = Disk(500)
    made = prompts(disk)
    made.insert_cache("model", tokens, rows(len(tokens)))
    assert found(made, [*tokens, 5]) == len(tokens)
    assert disk.inserted == []
    assert disk.matches == 0


def test_a_store_is_of_its_model():
    disk = Disk(500)
    made = prompts(disk)
    made.insert_cache("another", TEXT, rows(1000))
    assert found(made, [*TEXT, *TEXT], "another") == 1000
    assert found(made, TEXT, "a third") == 0
    assert disk.inserted == []
    made.keep_on_disk(None, None)
    assert found(made, TEXT) == 0
    assert disk.matches == 0


def test_a_line_tells_what_a_request_found_and_one_what_was_stored(caplog):
    caplog.set_level(logging.INFO)
    disk = Disk(800)
    made = prompts(disk)
    made.fetch_nearest_cache("model", TEXT)
    made.fetch_nearest_cache("model", TEXT)
    made.fetch_nearest_cache("another", TEXT)
    made.report()
    made.insert_cache("model", TEXT, rows(1000))
    disk.facts |= {"waiting": 1}
    made.report()
    disk.facts |= {"waiting": 0, "tokens_written": 1200, "bytes_written": 250_000}
    made.report()
    made.report()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" ms)")[-1] for line in lines[:2]] == [", 200 to compute"] * 2
    assert lines[0].startswith("prompt of 1,000 tokens: 800 from disk (0.1 kB, ")
    assert lines[1].startswith("prompt of 1,000 tokens: 800 from memory (8.2 kB, ")
    assert lines[2:] == ["prompt of 1,000 tokens: none kept, 1,000 to compute", "stored 1,200 tokens in 0.2 MB (exact)"]


def test_while_prompts_keep_coming_it_is_told_now_and_then_what_was_stored(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    disk = Disk()
    disk.facts |= {"waiting": 3, "tokens_written": 700, "bytes_written": 1000}
    made = prompts(disk)
    made.insert_cache("model", TEXT, rows(1000))
    made.report()
    assert "stored" not in caplog.text
    monkeypatch.setattr(module, "REPORT_SECONDS", 0)
    made.report()
    disk.facts |= {"waiting": 0, "tokens_written": 1000, "bytes_written": 2000}
    made.report()
    made.report()
    assert [record.getMessage() for record in caplog.records] == [
        "stored 700 tokens in 1.0 kB (exact)", "stored 300 tokens in 1.0 kB (exact)",
    ]  # fmt: skip


def test_statistics_count_tokens_by_where_they_came_from():
    made = prompts(Disk(800), max_bytes=10**6)
    for _ in range(2):
        made.fetch_nearest_cache("model", TEXT)
    facts = made.statistics()
    expected = {"requests": 2, "prompt_tokens": 2000, "from_memory": 800, "from_disk": 800}
    assert {key: facts[key] for key in expected} == expected
    assert facts["memory"] == {"caches": 1, "bytes": made.nbytes, "limit_bytes": 10**6}
    assert prompts().statistics()["store"] is None

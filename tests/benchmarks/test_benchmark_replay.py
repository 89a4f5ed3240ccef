"""A day replayed on the index alone: what is found again, and what a bound costs."""

import numpy as np
import pytest

from benchmarks import million, replayed, traces
from benchmarks.experiments import store_index

DAY = traces.day(seed=3, sessions=2)[:25]
ASKED = sum(len(request.prompt) for request in DAY)


def request(*parts, answer=(9,)):
    return traces.Request(0.0, 0, "user", tuple(np.array(part, np.int32) for part in parts), np.array(answer, np.int32))


def test_nothing_is_written_twice_and_what_was_asked_before_is_found(tmp_path, monkeypatch):
    found = replayed.through_store(DAY, tmp_path / "large", 1e6)
    assert found.removed == 0
    assert found.written == found.stored <= traces.summary(DAY)["different_tokens"]
    assert found.hits[0] == 0
    assert all(0 <= hits < len(request.prompt) for hits, request in zip(found.hits, DAY))
    assert sum(found.hits) > 0.7 * ASKED
    assert len(found.lookups) == len(DAY)
    monkeypatch.setattr(replayed, "BYTES", 600)  # so that the least bound of a store holds few tokens
    small = replayed.through_store(DAY, tmp_path / "small", 7_500)
    assert small.removed > 0
    assert small.stored < found.stored
    assert sum(small.hits) <= sum(found.hits)


def test_a_raw_file_is_written_anew_each_turn():
    texts = [request([1] * 10, [2] * 10), request([1] * 10, [2] * 10, [9], [3] * 5), request([1] * 10, [4] * 8)]
    found = replayed.through_files(texts, 100)
    assert found.hits == [0, 21, 10]  # the second goes on from the first answer, the third shares the system prompt
    assert found.written == 21 + 27 + 19
    assert (found.stored, found.removed) == (27 + 19, 0)  # the second's file took the place of the first's


@pytest.mark.parametrize(("tokens", "stored", "removed"), [(27, 19, 1), (20, 19, 1), (5, 0, 0)])
def test_raw_files_stay_within_their_bound(tokens, stored, removed):
    texts = [request([1] * 10, [2] * 10, answer=()), request([5] * 10, [4] * 8)]
    found = replayed.through_files(texts, tokens)
    assert (found.stored, found.removed) == (stored, removed)


def test_the_report_has_a_row_for_each_store(tmp_path):
    rows = replayed.compare(DAY[:3], (1,), {"blocks at a twentieth": 20}, tmp_path)
    assert [row["store"] for row in rows] == ["blocks at a twentieth", "a raw file a conversation"]
    assert rows[0]["written_gb"] < rows[1]["written_gb"] / 20
    trace = traces.summary(DAY)
    index = {"blocks": 10**6, "index_bytes": 3 * 10**8, "in_memory": True, "tokens": 32_768, "text_blocks": 64}
    index |= {f"{key}_{what}_ms": 1.25 for key in ("open", "find", "miss", "add") for what in ("median", "worst")}
    summary = {"trace": trace, "day": rows, "index": index}
    said = store_index.section({"config": {"bytes_a_token": 147_456}, "summary": summary})
    assert said.startswith("A day of 25 requests in 2 sessions")
    assert said.count("| 1 GB |") == 2
    assert "| - | - |\n\nAn index of 1,000,000 blocks, 300.0 MB, in memory" in said
    assert "| find a prompt of 32,768 tokens, all stored | 1.2 | 1.2 |" in said


def test_an_index_is_opened_asked_and_added_to(monkeypatch):
    monkeypatch.setattr(million, "TRIES", 2)
    found = million.measure(200)
    assert found["blocks"] == 8 + 4 * 56  # four texts, of 64 blocks with the same first eight
    assert all(0 < found[f"{key}_median_ms"] <= found[f"{key}_worst_ms"] for key in ("open", "find", "miss", "add"))

"""The synthetic day of an agent: what its requests have in common."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import traces

DAY = traces.day(seed=1, sessions=40)
KINDS = {"branch", "clear", "edit", "left", "retry", "summary", "tool", "user"}


def common(a, b):
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size


def sessions():
    return [[request for request in DAY if request.session == number] for number in range(40)]


def test_one_seed_gives_one_day_and_another_seed_another():
    again, other = traces.day(seed=1, sessions=40), traces.day(seed=2, sessions=40)
    assert len(again) == len(DAY) > 1000
    for a, b in zip(DAY, again):
        assert (a.at, a.session, a.kind) == (b.at, b.session, b.kind)
        assert np.array_equal(a.prompt, b.prompt)
        assert np.array_equal(a.answer, b.answer)
    assert not np.array_equal(DAY[0].prompt, other[0].prompt)


def test_a_day_is_in_order_and_has_everything_an_agent_does():
    assert [request.at for request in DAY] == sorted(request.at for request in DAY)
    assert {request.kind for request in DAY} == KINDS
    assert max(len(request.prompt) for request in DAY) <= traces.LONGEST
    assert all(request.prompt.dtype == request.answer.dtype == np.int32 for request in DAY)
    found = traces.summary(DAY)
    assert found["requests"] == sum(found["kinds"].values()) == len(DAY)
    assert found["different_tokens"] < found["prompt_tokens"] / 10


def test_all_sessions_share_a_system_prompt_and_those_of_a_project_more():
    first = [requests[0] for requests in sessions()]
    assert {common(first[0].prompt, request.prompt) >= traces.SYSTEM for request in first} == {True}
    assert {request.system for request in DAY} == {traces.SYSTEM}
    assert 1 < len({id(request.parts[1]) for request in first}) <= traces.PROJECTS < len(first)


@pytest.mark.parametrize(
    ("kind", "keeps"),
    [
        ("retry", lambda kept, before, now: kept == before == now),
        ("tool", lambda kept, before, now: kept == before < now),
        ("clear", lambda kept, before, now: traces.SYSTEM <= kept < before),
        ("summary", lambda kept, before, now: traces.SYSTEM <= kept < before),
        ("edit", lambda kept, before, now: traces.SYSTEM <= kept < before),
    ],
)
def test_what_a_request_keeps_of_the_one_before_is_of_its_kind(kind, keeps):
    pairs = [
        (before, now)
        for requests in sessions()
        if all(
            request.kind not in ("branch", "left") for request in requests
        )  # there the one before may be of another branch
        for before, now in pairwise(requests)
        if now.kind == kind
    ]
    assert pairs
    for before, now in pairs:
        assert keeps(common(before.prompt, now.prompt), len(before.prompt), len(now.prompt))
    most = max(common(before.prompt, now.prompt) for before, now in pairs)
    assert (most > traces.SYSTEM + traces.INSTRUCTIONS[1]) == (kind != "summary")


def test_an_answer_stands_in_the_next_prompt_but_for_a_few():
    same = [
        np.array_equal(before.answer, now.parts[len(before.parts)])
        for requests in sessions()
        for before, now in pairwise(requests)
        if now.kind == "tool" and before.kind in ("tool", "user") and len(now.parts) > len(before.parts)
    ]
    assert 0.9 < np.mean(same) < 1


def test_sessions_stay_for_hours_and_go_on():
    assert max(now.at - before.at for requests in sessions() for before, now in pairwise(requests)) > 2 * traces.HOUR


def test_tokens_of_a_day_may_be_those_of_texts():
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()))
    prompt = traces.day(sessions=1, pieces=traces.text_pieces(tokenizer))[0].prompt
    assert 4_400 < len(prompt) < 11_000
    assert prompt.max() < 256
    assert len(traces.words(np.random.default_rng(0), 50).split()) == 50

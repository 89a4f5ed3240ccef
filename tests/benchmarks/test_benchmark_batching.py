"""Requests at once: what counts as decoding, which answers are the same, and what the report says of it."""

import pytest

from benchmarks import served
from benchmarks.experiments import batching
from benchmarks.serving import Answer

STUB = "tests.benchmarks.stub_server"


def answer(*pieces, text="x", tokens=4):
    return Answer(text, pieces[0], pieces[-1], 10, 0, tokens, "", pieces)


def test_decoding_counts_what_came_while_all_were_answered():
    early, late = answer(1.0, 2.0, 3.0, 4.0), answer(2.5, 3.5, 4.5, 5.5, tokens=8)
    assert batching.decoding([early]) == (3.0, 3.0)
    # From 2.5 to 4: two pieces of one token, and one of two.
    assert batching.decoding([early, late]) == (4.0, 1.5)


@pytest.mark.parametrize("others", [[answer(4.0, 5.0)], [Answer("", 1.0, 2.0)]])
def test_requests_that_were_answered_one_after_the_other_decode_nothing_at_once(others):
    assert batching.decoding([answer(1.0, 2.0, 4.0), *others]) is None


def test_a_server_is_asked_alone_and_at_once(tmp_path):
    said = ["1" * 40, "2" * 60, "3" * 50]
    found = batching.measured(served.Contender("stub", (STUB, "answers"), {}), said, 3, tmp_path / "log")
    row = batching.summarise({"server": "stub", **found})
    assert (row["requests"], row["equal"], row["tokens"]) == (3, 3, 9)
    assert [each["text"] for each in found["together"]] == ["<40>", "<60>", "<50>"]
    assert row["times"] == pytest.approx(row["together"] / row["alone"], rel=0.05)
    with pytest.raises(RuntimeError, match=r"refusing: .*404"):
        batching.measured(served.Contender("refusing", (STUB, "refuses"), {}), said, 3, tmp_path / "log")


def sample(server, texts, seconds=2.0):
    alone = [answer(1.0, 2.0, 3.0, 4.0)._asdict() for _ in texts]
    together = [answer(1.0, 1.5, 2.0, 2.5, text=text)._asdict() for text in texts]
    return {"server": server, "alone": alone, "together": together, "seconds": seconds, "peak_bytes": 10**9,
            "alone_peak_bytes": None}  # fmt: skip


def test_the_report_has_what_a_batch_gains_beside_mlx_lms():
    rows = [
        batching.summarise(each)
        for each in (sample(served.THEIRS, "xx"), sample("mlxkv serve --cache int8", "xy", 1.6))
    ]
    config = {"model": "smollm2-135m", "lengths": [40, 400], "answer": 64, "cores": 2, "load_average": 0.2}
    result = {"config": config, "summary": rows}
    assert batching.brief(result) == (
        "2 requests of 40 to 400 tokens at once get 5.0 times the tokens a second of one after the other with `--cache int8`, 4.0 times"
        " with mlx_lm.server; 1 of 2 answers are those of the requests alone (2 there)."
    )
    said = batching.section(result)
    assert "| `mlxkv serve --cache int8` | 1.0 | 5.0 | 5.0 | 1.0 | 4.0 | 4.0 | 1.25 | 1 of 2 | 1000.0 MB | - |" in said
    serial = {key: value for key, value in rows[1].items() if not key.startswith("decode_")}
    assert "| 5.0 | - | - | - | 1.25 |" in batching.section({**result, "summary": [rows[0], serial]})


def test_prompts_are_as_long_as_asked_and_differ():
    class Words:
        encode = staticmethod(str.split)

        @staticmethod
        def decode(tokens, skip_special_tokens):
            return " ".join(tokens)

    found = batching.prompts(Words, batching.LENGTHS)
    assert [len(prompt.split()) for prompt in found] == list(batching.LENGTHS)
    assert len({prompt[:20] for prompt in found}) == len(found)

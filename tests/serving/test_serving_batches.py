"""Requests to live caches are answered at once, and each as it would be alone."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlx_lm import generate
from servers import serving
from talking import talker_folder

from mlxkv import lm
from mlxkv.live.batch import LiveBatch
from mlxkv.live.seam import make_cache

TEXT = "In a hole in the ground there lived a rabbit, and it read one book after another. "
PROMPTS = [f"{number}{TEXT * 3}"[: 9 + 31 * number] for number in range(8)]
TOKENS = 8


@pytest.fixture
def widths(monkeypatch):
    """Rows of the batches that attended."""
    found, attend = set(), LiveBatch.attend

    def watched(batch, *arguments, **more):
        found.add(len(batch.rows))
        return attend(batch, *arguments, **more)

    monkeypatch.setattr(LiveBatch, "attend", watched)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: talker_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "lfm2")}


def streamed(client, prompt):
    """The text of a stream."""
    events = client.stream("/v1/completions", {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0})
    return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.mark.parametrize(("method", "kind"), [("int4", "llama"), ("h2o-96", "lfm2")])
def test_eight_requests_at_once_are_answered_as_one_by_one(folders, widths, method, kind):
    with serving(folders[kind], cache=method, store=False) as client:
        expected = [client.complete(prompt, TOKENS)[0] for prompt in PROMPTS]
    assert max(widths) <= 2  # the trial of the model
    with serving(folders[kind], cache=method, store=False) as client, ThreadPoolExecutor(8) as threads:
        halves = [
            threads.submit(streamed, client, prompt) if number % 2 else threads.submit(client.complete, prompt, TOKENS)
            for number, prompt in enumerate(PROMPTS)
        ]
        answers = [each.result() for each in halves]
        # What waited in RAM goes on in the next batch.
        longer = list(
            threads.map(lambda text: client.complete(text, 1), [a + b + "x" for a, b in zip(PROMPTS, expected)])
        )
    assert [each if isinstance(each, str) else each[0] for each in answers] == expected
    assert max(widths) > 2
    # What cannot be cut needs its very cache, and RAM holds ten, of whichever came last.
    kept = [cached >= tokens - 2 for _, tokens, cached in longer]
    assert all(kept) if kind == "llama" else any(kept)


def test_answers_in_a_batch_are_those_of_generate_and_are_stored(folders, widths, tmp_path):
    model, tokenizer = lm.load(str(folders["llama"]))
    prompts = [TEXT + prompt for prompt in PROMPTS]
    expected = [
        generate(model, tokenizer, text, max_tokens=TOKENS, prompt_cache=make_cache(model, "int8")) for text in prompts
    ]
    for start in range(2):
        with (
            serving(folders["llama"], exact=True, folder=tmp_path, cache="int8") as client,
            ThreadPoolExecutor(8) as threads,
        ):
            found = list(threads.map(lambda text: client.complete(text, TOKENS), prompts))
        assert start or [text for text, _, _ in found] == expected
        if start:
            assert all(cached > tokens - 64 for _, tokens, cached in found)
    assert max(widths) > 2


def test_a_model_that_does_not_take_batches_is_served_one_request_at_a_time(tmp_path, widths, caplog):
    folder = talker_folder(tmp_path, "nemotron_h")
    with serving(folder, cache="int8", store=False) as client, ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda text: client.complete(text, 3), PROMPTS[:2]))
    assert all(text for text, _, _ in found)
    assert not widths - {1, 2}
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "answered one at a time: this nemotron_h model does not take batches" in told[0]

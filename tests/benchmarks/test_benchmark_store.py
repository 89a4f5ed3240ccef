"""The experiment on prompts that survive a restart: its servers and clients, and what it says of samples made up."""

import mlx.core as mx
import pytest
from conftest import tiny_model
from mlx_lm.models.cache import KVCache

from benchmarks import raw_server, served, serving, stored
from benchmarks.experiments import store

STUB = "tests.benchmarks.stub_server"
PASSAGES = {"one": "1" * 40, "two": "2" * 60}


def stub(how="answers", name="stub", folder=None):
    return served.Contender(name, (STUB, how), {}, folder)


@pytest.mark.parametrize("has_template", [False, True])
def test_every_text_is_asked_about_cold_from_memory_and_after_a_restart(has_template, tmp_path):
    contender = stub(folder=tmp_path)  # whose files, the log, are read from disk after the restart
    found = served.first_tokens(contender, PASSAGES, served.spoken(has_template), tmp_path / "log")
    assert [(record["when"], record["passage"]) for record in found] == [
        (when, passage) for when in ("cold", "memory", "restarted") for passage in PASSAGES
    ]
    assert all(0 < record["first"] <= record["seconds"] for record in found)
    assert {record["cached"] for record in found if record["when"] in ("cold", "restarted")} == {0}
    lengths = {record["prompt"] - len(PASSAGES[record["passage"]]) for record in found if record["when"] == "memory"}
    # With messages another question follows the text; else a question follows the text and the first answer, "<40>".
    assert lengths == {len(served.QUESTIONS[1]) + (0 if has_template else 4)}
    reused = {record["cached"] > 0 for record in found if record["when"] == "memory"}
    assert reused == {not has_template}


def test_mlx_lms_server_also_says_what_the_right_answers_are(tmp_path):
    found = served.first_tokens(stub(name=served.THEIRS), PASSAGES, served.spoken(True), tmp_path / "log")
    assert [record["when"] for record in found] == ["cold"] * 2 + ["memory"] * 2 + ["reference"] * 2 + ["restarted"] * 2


@pytest.mark.parametrize(("how", "says"), [("refuses", "404"), ("ends early", "ends early")])
def test_an_answer_that_does_not_come_is_an_error(how, says, tmp_path):
    with serving.running((STUB, how)) as server:
        assert says in server.ask("x", 1).error
        loaded = serving.load(server, [served.talk(served.spoken(True), [0, number], 2) for number in range(3)])
    assert (loaded.requests, loaded.errors) == (0, 6)
    with pytest.raises(RuntimeError, match=says):
        served.first_tokens(stub(how), PASSAGES, served.spoken(True), tmp_path / "log")


def test_clients_ask_at_once_and_say_all_that_was_said(tmp_path):
    (found,) = served.clients(stub(), served.spoken(False), (4,), 2, tmp_path / "log")
    assert (found["clients"], found["requests"], found["errors"]) == (4, 8, 0)
    assert 0 < found["cached_share"] < 1
    assert found["first_95"] >= found["first_median"] > 0


def test_a_server_that_does_not_start_is_an_error():
    with pytest.raises(RuntimeError, match="does not answer"), serving.running(("tests.benchmarks.no_such_server",)):
        pass


def cache(length, seed=0):
    entry = KVCache()
    entry.update_and_fetch(mx.random.normal((1, 1, length, 4), key=mx.random.key(seed)), mx.zeros((1, 1, length, 4)))
    return [entry]


@pytest.mark.parametrize("bits", [None, 16])
def test_raw_files_survive_and_the_longest_beginning_is_taken(bits, tmp_path):
    first = raw_server.FilePromptCache(10, tmp_path, bits)
    first.insert_cache("m", [1, 2, 3], cache(3))
    first.insert_cache("m", [1, 2, 3, 4, 5, 6], cache(6, seed=1))
    again = raw_server.FilePromptCache(10, tmp_path, bits)
    found, rest = again.fetch_nearest_cache("m", [1, 2, 3, 4, 9, 9])
    assert rest == [9, 9]
    assert (found[0].offset, found[0].keys.dtype) == (4, mx.float32)
    right = cache(6, seed=1)[0].keys[:, :, :4]
    assert mx.allclose(found[0].keys[:, :, :4], right, atol=0 if bits is None else 1e-2)
    assert again.fetch_nearest_cache("m", [7, 8]) == (None, [7, 8])


def test_a_store_is_measured_on_a_model(tmp_path):
    model = tiny_model("llama")
    tokens = [(7 * place) % 97 for place in range(700)]
    (none := tmp_path / "none").mkdir()
    libraries = {"uncalibrated": none, "exact": none}
    found = store.summarise(stored.prefixes(model, {"a": tokens[:266]}, 256, 9, libraries, tmp_path / "prefixes"))
    rows = {row["mode"]: row for row in found}
    assert list(rows) == [*stored.RAW, "uncalibrated", "exact"]
    assert rows["exact"]["kl"] == rows["mlx-lm's file"]["kl"] == 0
    assert rows["exact"]["coding"] == "exact"
    assert 1.9 < rows["mlx-lm's file"]["file_bytes"] / rows["mlx-lm's file, 16 bits"]["file_bytes"] < 2.1
    with stored.library(none):
        talk = stored.conversation(model, tokens, (64, 70, 10), 4, 2, tmp_path / "conversation")
    assert talk["tokens"] == 64 + 4 * 80
    assert talk["written_bytes"] >= talk["final_bytes"] > 0
    assert talk["branch_shared"] == 64 + 2 * 80
    assert 0 < talk["branch_bytes"] < talk["final_bytes"]
    assert talk["raw_written_bytes"] > 2 * talk["raw_bytes"]


def record(server, when, passage="a", first=1.0, text="x", cached=0):
    return {
        "server": server,
        "when": when,
        "passage": passage,
        "first": first,
        "text": text,
        "cached": cached,
        "prompt": 2085,
    }


OURS = "mlxkv serve, calibrated"
FIRST = [
    *(
        record(served.THEIRS, when, passage, 20.0)
        for when in ("cold", "memory", "reference", "restarted")
        for passage in "ab"
    ),
    *(record(OURS, "cold", passage, 22.0) for passage in "ab"),
    *(record(OURS, "memory", passage, 0.4, text) for passage, text in zip("ab", "xy")),
    *(record(OURS, "restarted", passage, first, cached=2016) for passage, first in zip("ab", (0.5, 1.5))),
]
SAMPLES = [
    {"text": text, "mode": mode, "coding": coding, "file_bytes": size, "folder_bytes": size + 10**5, "kl": kl,
     "top1_agreement": 0.97, "fetched": 2016, "fetch_seconds": 0.5}
    for text, extra in (("code", 0.0), ("chat", 0.002))
    for mode, coding, size, kl in (
        ("mlx-lm's file", "safetensors", 190 * 10**6, 0.0), ("mlx-lm's file, 16 bits", "safetensors", 95 * 10**6, 0.0),
        ("calibrated", "kvtc-rd 38", 47 * 10**5, 0.004 + extra),
    )
]  # fmt: skip
TALK = {
    "turns": 50, "tokens": 6512, "written_bytes": 16 * 10**6, "final_bytes": 15 * 10**6, "system_written_bytes": 18 * 10**6,
    "raw_bytes": 600 * 10**6, "raw_written_bytes": 17 * 10**9, "branch_tokens": 600, "branch_shared": 3512,
    "branch_bytes": 15 * 10**5,
}  # fmt: skip


def test_the_report_has_times_bytes_and_what_a_conversation_wrote():
    clients = [
        {"server": OURS, "clients": 32, "requests": 64, "errors": 0, "requests_a_second": 3.5, "first_median": 1.0,
         "first_95": None, "cached_share": 0.5, "peak_bytes": None}
    ]  # fmt: skip
    summary = {
        "first": store.summarise_first(FIRST),
        "prefixes": store.summarise(SAMPLES),
        "conversation": TALK,
        "clients": clients,
    }
    result = {"config": {"model": "smollm2-135m", "length": 2048, "predict": 128}, "summary": summary}
    said = store.section(result)
    assert said.startswith("On SmolLM2. ")
    assert "| mlxkv serve, calibrated | 22.00 | 0.40 | 1.00 | 20.0x | 2,016 | 2 of 2, 1 of 2, 2 of 2 |" in said
    assert "| calibrated | kvtc-rd 38 | 4.7 MB | 40.4x | 20.2x | 0.0050 | 0.0060 | 97.0 % | 0.50 |" in said
    assert "16.0 MB written (18.0 MB with its index, as the system counts them), 1.07 times its final 15.0 MB" in said
    assert "added 1.50 MB, 1.09 times as much a token as the whole" in said
    assert "| mlxkv serve, calibrated | 32 | 3.50 | 0 | 1.00 | - | 50.0 % | - |" in said
    assert store.brief(result) == (
        "After a restart the first token of an answer to 2,085 tokens comes after 1.00 s; computed again, after 20.0 s. A text's first"
        " 2,048 tokens take 4.7 MB on disk, where mlx-lm's own file takes 190.0 MB (95.0 MB at 16 bits a number), and predictions of"
        " the next 128 diverge by 0.0050 nats."
    )


def test_texts_are_long_enough_for_any_prefix():
    assert min(len(text) for text in store.passages().values()) > 10_000

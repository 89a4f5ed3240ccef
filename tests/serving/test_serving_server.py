"""The server: mlx-lm's own answers, prompts taken up from RAM and disk on every path, and what else it does and refuses."""

import http.client
import json
import logging
import threading
import time
from contextlib import suppress
from itertools import count

import mlx.core as mx
import pytest
from mlx_lm import generate
from servers import serving
from talking import CHATML, adapter_folder, talker_folder

from mlxkv import Store, lm
from mlxkv.errors import InputError, MlxkvError, ModelNotFoundError, PresetError, UnsupportedError
from mlxkv.live.seam import make_cache
from mlxkv.serving import generation
from mlxkv.serving import server as module
from mlxkv.serving.prompt_cache import PromptCache

TEXT = "In a hole in the ground there lived a rabbit, and it read one book after another. "
SYSTEM = [{"role": "system", "content": "You are a librarian who answers in few words."}]
NUMBERS = count(1)
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return talker_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return talker_folder(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def client(talker, tmp_path_factory):
    """One server for what needs no other; its prompts are told apart by numbers."""
    with serving(talker, exact=True, folder=tmp_path_factory.mktemp("store")) as client:
        yield client


@pytest.fixture
def number():
    """Six digits that no other prompt begins with."""
    return f"{next(NUMBERS) * 7919 % 10**6:06d}"


def user(text):
    return [*SYSTEM, {"role": "user", "content": text}]


def test_answers_are_those_of_mlx_lm(client, talker):
    model, tokenizer = lm.load(str(talker))
    expected = generate(model, tokenizer, TEXT, max_tokens=20)
    assert client.complete(TEXT, 20)[0] == expected
    again, tokens, cached = client.complete(TEXT, 20)
    assert (again, cached) == (expected, tokens - 1)


# Each is one of the paths on which mlx-lm hands a cache over, or does not.
PATHS = {
    "text": {"prompt": TEXT},
    "one token": {"prompt": TEXT, "max_tokens": 1},
    "stop words": {"prompt": TEXT, "stop": ["e", "o", "a", "p", " "]},
    "seed": {"prompt": TEXT, "seed": 7},
    "seed and stop words": {"prompt": TEXT, "seed": 7, "stop": ["e", "o", "a", "p", " "]},
    "chat": {"messages": user(TEXT)},
    "seeded chat": {"messages": user(TEXT), "seed": 7},
    "tools": {"messages": user(TEXT), "tools": TOOLS},
    "result of a tool": {"messages": [*user(TEXT), {"role": "tool", "content": "Nothing was found."}], "tools": TOOLS},
    "answer begun": {"messages": [*user(TEXT), {"role": "assistant", "content": "The book"}]},
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_is_computed_once_whatever_its_answer(client, number, path, streamed):
    body = json.loads(json.dumps({"max_tokens": 6, "temperature": 0, **PATHS[path]}).replace(TEXT, number + TEXT * 2))
    where = "/v1/completions" if "prompt" in body else "/v1/chat/completions"

    def cached():
        answer = list(client.stream(where, body))[-1] if streamed else client.post(where, body)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["usage"]["prompt_tokens"]

    first, tokens = cached()
    assert first < tokens - len(TEXT * 2) + 10
    assert cached() == (tokens - 1, tokens)


@pytest.mark.parametrize("more", [{}, {"seed": 7}], ids=["batched", "alone"])
def test_a_client_that_hangs_up_leaves_its_prompt(client, number, more):
    body = {"messages": user(number + TEXT * 2), "stream": True, "max_tokens": 100_000, **more}
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = connection.getresponse()
    answer.read(300)
    answer.close()
    connection.close()
    deadline = time.monotonic() + 30
    while client.server._generator.running and time.monotonic() < deadline:
        time.sleep(0.01)
    _, tokens, cached = client.chat(body["messages"], **more)
    assert cached == tokens - 1


def test_many_at_once_get_what_each_gets_alone(client, talker):
    model, tokenizer = lm.load(str(talker))
    texts = [f"{i} {TEXT}"[: 30 + 9 * i] for i in range(12)]
    answers = {}

    def ask(text):
        answers[text] = client.complete(text, 12)[0]

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {text: generate(model, tokenizer, text, max_tokens=12) for text in texts}


@pytest.mark.parametrize(("body", "status", "said"), [
    ({"prompt": ""}, 404, "the prompt has no tokens"),
    ({"prompt": "a", "stop": [["a"]]}, 400, "stop has to be a text"),
    ({"prompt": "a", "stop": ""}, 200, ""),
    ({"prompt": "a", "stop": [""]}, 400, "stop has to be a text"),
    ({"prompt": "a", "stop": {"a": 1}}, 400, "stop has to be a text"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "no model directory 'gpt-4'"),
    ({"prompt": ["a"]}, 404, "one text"),
    ({"prompt": [["a"], "b"]}, 404, ""),
    ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "a", "seed": -1}, 404, "seed has to be"),
    ({"prompt": "a", "logit_bias": {"99999999": 5}}, 404, "a token that there is not"),
    ({"prompt": "a", "logit_bias": {"-1": 5}}, 404, "a token that there is not"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_and_ends_nothing(client, body, status, said):
    if status == 200:
        assert client.post("/v1/completions", {**body, "max_tokens": 1})
    else:
        found, error = client.refused("/v1/completions", body)
        assert found == status
        assert said in error
    assert client.complete("a", 1)[1] == 1
    assert client.get("/health") == {"status": "ok"}


def test_numbers_of_the_store_are_json_and_name_no_folder(client):
    for number in range(2):
        client.complete(f"{number}{TEXT * 4}", 1)
    facts = client.get("/v1/mlxkv/store")
    assert facts["requests"] > 0
    assert facts["prompt_tokens"] >= facts["from_memory"] + facts["from_disk"]
    assert facts["memory"]["caches"] > 0
    assert facts["computed_tokens_per_second"] > 0
    assert facts["store"]["coding"] == "exact"
    assert "folder" not in json.dumps(facts)
    assert client.get("/v1/models")["data"]


def test_a_request_may_name_another_model(client, talker, other, number):
    text = number + TEXT * 2
    first = client.complete(text)
    there = client.complete(text, model=str(other))
    assert there[0] != first[0]
    assert there[2] == 0
    assert client.complete(text, model=str(other)) == (*there[:2], there[1] - 1)
    assert client.complete(text) == (*first[:2], first[1] - 1)


def test_a_request_may_name_an_adapter(client, talker, number, tmp_path):
    text, adapter = number + TEXT * 2, str(adapter_folder(tmp_path))
    plain, adapted = (client.complete(text, model=str(talker), **more) for more in ({}, {"adapters": adapter}))
    assert adapted[0] != plain[0]
    assert adapted[2] == 0
    assert client.complete(text, model=str(talker), adapters=adapter) == (*adapted[:2], adapted[1] - 1)


@pytest.mark.parametrize(("kind", "path"), [
    ("llama", {}), ("lfm2", {}), ("lfm2", {"seed": 7}), ("glm4_moe_lite", {}), ("gemma3_text", {}),
])  # fmt: skip
def test_after_a_restart_prompts_come_from_disk_and_answers_are_the_same(tmp_path, kind, path):
    folder, store = talker_folder(tmp_path / kind, kind), tmp_path / "store"
    messages, expected = user(TEXT * 3), None
    for start in range(2):
        with serving(folder, exact=True, folder=store) as client:
            answer, tokens, cached = client.chat(messages, **path)
            longer = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
            facts = [answer, client.chat(longer, **path)[0]]
            if start:
                assert facts == expected
                # A hybrid goes on where a request ended, which one at a time is after its answer.
                assert cached >= tokens - 64 if kind != "lfm2" or not path else cached == 0
                assert client.get("/v1/mlxkv/store")["from_disk"] == cached
            expected = facts


def test_live_caches_answer_as_generate_does_and_are_stored(talker, tmp_path):
    model, tokenizer = lm.load(str(talker))
    expected = generate(model, tokenizer, TEXT * 3, max_tokens=40, prompt_cache=make_cache(model, "int4"))
    assert expected != generate(model, tokenizer, TEXT * 3, max_tokens=40)
    for start in range(2):
        with serving(talker, exact=True, folder=tmp_path / "store", cache="int4") as client:
            text, tokens, cached = client.complete(TEXT * 3, 40)
            assert start or text == expected
            assert (cached > tokens - 64) == bool(start)
            assert client.complete(TEXT * 3 + text + " It")[2] >= tokens


def test_live_conversations_that_wait_have_a_bound(talker):
    with serving(talker, "--prompt-cache-bytes", "40000", cache="int8", store=False) as client:
        sizes = []
        for number in range(4):
            client.complete(f"{number}{TEXT * 2}", 1)
            client.complete("x", 1)  # by whose turn the cache before is kept
            sizes.append(client.get("/v1/mlxkv/store")["memory"])
    assert 0 < sizes[0]["bytes"] < sizes[-1]["bytes"] <= sizes[-1]["limit_bytes"] == 40_000 < 4 * sizes[0]["bytes"]


@pytest.mark.parametrize(("flags", "options", "said"), [
    (["--draft-model", "MODEL"], {}, "draft models"), (["--kv-bits", "8"], {}, "--kv-bits"), ([], {"cache": "h2o"}, "h2o"),
])  # fmt: skip
def test_what_cannot_be_stored_is_kept_in_memory_and_told_once(talker, tmp_path, caplog, flags, options, said):
    flags = [str(talker) if flag == "MODEL" else flag for flag in flags]
    with serving(talker, *flags, folder=tmp_path / "store", **options) as client:
        text, tokens, _ = client.complete(TEXT * 3)
        for more in ("", text + "x"):
            assert client.complete(TEXT * 3 + more)[2] >= (tokens - 1 if more or "cache" not in options else 0)
        assert client.get("/v1/mlxkv/store")["store"] is None
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert said in told[0]


def test_drafts_change_no_answer(talker, other):
    model, tokenizer = lm.load(str(talker))
    with serving(talker, "--draft-model", str(other), store=False) as client:
        first = client.complete(TEXT, 20)[0]
        for text, answer in ((TEXT, first), (TEXT + first + " But", client.complete(TEXT + first + " But")[0])):
            assert answer == generate(model, tokenizer, text, max_tokens=20 if text == TEXT else 8)
        assert client.complete(TEXT, 20)[0] == first


def test_thoughts_that_a_template_begins_are_no_part_of_what_is_kept(talker, tmp_path):
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with serving(talker, "--chat-template", template, exact=True, folder=tmp_path / "store") as client:
        _, tokens, cached = client.chat(user(TEXT * 3))
        assert cached == 0
        assert client.chat(user(TEXT * 3))[1:] == (tokens, tokens - 1)
        longer = [*user(TEXT * 3), {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        assert client.chat(longer)[2] >= tokens - len("\n<think>\n")


def test_weights_have_the_fast_type_of_the_device(talker, tmp_path):
    for file in talker.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {name: value.astype(mx.float16) for name, value in mx.load(str(talker / "model.safetensors")).items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights, {"format": "mlx"})
    with serving(tmp_path, "--draft-model", str(tmp_path), store=False) as client:
        client.complete(TEXT, 1)
        provider = client.server._generator.model_provider
        on_cpu = mx.default_device() == mx.cpu
        for model in (provider.model, provider.draft_model):
            assert model.stored_dtype == "float16"
            assert model.model.norm.weight.dtype == (mx.float32 if on_cpu else mx.float16)


def test_a_server_without_a_model_takes_those_of_requests(talker):
    with serving(None, store=False) as client:
        assert "without --model" in client.refused("/v1/completions", {"prompt": "a"})[1]
        assert client.complete("a", 1, model=str(talker))[1] == 1


@pytest.mark.parametrize(("flags", "options", "error", "said"), [
    (["--prot", "1"], {}, InputError, "neither mlxkv serve nor mlx_lm.server has a flag --prot; did you mean --port"),
    (["--port", "x"], {}, InputError, "argument --port: invalid int value: 'x'"),
    (["--model", "gpt-4"], {}, ModelNotFoundError, "no model directory 'gpt-4'"),
    (["--draft-model", "nowhere"], {}, ModelNotFoundError, "no model directory 'nowhere'"),
    (["--host", "256.0.0.1"], {}, InputError, "cannot listen on 256.0.0.1"),
    (["--port", "99999"], {}, InputError, "port 99999 is none"),
    (["--kv-bits", "8"], {"cache": "int8"}, InputError, "--cache and --kv-bits"),
    ([], {"cache": "int9"}, PresetError, "no preset or live method 'int9'"),
    (["--model", "FOLDER"], {}, ModelNotFoundError, "cannot load"),
])  # fmt: skip
def test_what_cannot_be_served_is_told_at_once(tmp_path, flags, options, error, said):
    flags = [str(tmp_path) if flag == "FOLDER" else flag for flag in flags]
    with pytest.raises(error, match=said.replace("(", r"\(")), serving(None, *flags, store=False, **options):
        pass


def test_a_port_that_is_taken_is_told(client):
    port = client.url.rpartition(":")[2]
    with pytest.raises(InputError, match=f"is port {port} taken"), serving(None, "--port", port, store=False):
        pass


def test_several_processes_are_refused(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(generation.mx.distributed, "init", lambda: SimpleNamespace(size=lambda: 2, rank=lambda: 0))
    with pytest.raises(UnsupportedError, match="2 processes"), serving(None, store=False):
        pass


def test_a_thread_that_dies_ends_the_server_instead_of_leaving_a_dead_one(talker, monkeypatch):
    def fail(*_):
        raise ValueError("no memory is left")

    monkeypatch.setattr(PromptCache, "fetch_nearest_cache", fail)
    said = "the server ended: ValueError: no memory is left"
    gone = suppress(OSError, http.client.HTTPException)
    with pytest.raises(MlxkvError, match=said), serving(talker, store=False) as client, gone:
        client.complete(TEXT)


@pytest.mark.parametrize("more", [{}, {"seed": 7}], ids=["batched", "alone"])
def test_stopping_cuts_long_answers_and_stores_their_prompts(talker, tmp_path, monkeypatch, more):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    body = {"messages": user(TEXT * 3), "max_tokens": 10**6, **more}
    with serving(talker, exact=True, folder=tmp_path / "store") as client:
        events = client.stream("/v1/chat/completions", body)
        next(events)
        client.server.stop()
        with suppress(OSError, http.client.HTTPException):
            assert sum(1 for _ in events) < 10**5
    with serving(talker, exact=True, folder=tmp_path / "store") as client:
        _, tokens, cached = client.chat(user(TEXT * 3), **more)
        assert cached > tokens - 64


def test_the_end_writes_what_waits_of_a_model_that_was_given_up_whose_store_is_forgotten(
    talker, other, tmp_path, monkeypatch
):
    for name in ("MOST_PAUSE", "LONGEST_WAIT"):
        monkeypatch.setattr(f"mlxkv.store.writer.{name}", 1e9)  # nothing is written before the end
    monkeypatch.setattr(module.Serving, "_is_busy", lambda self: True)
    monkeypatch.setattr(Store, "close", lambda self: None)  # which would write it as well, in less time
    opened = module.Serving._open

    def open_(self, store, model, name):
        if name == str(other):
            raise UnsupportedError("these caches are not stored")
        return opened(self, store, model, name)

    monkeypatch.setattr(module.Serving, "_open", open_)
    with serving(talker, exact=True, folder=tmp_path / "store") as client:
        client.complete(TEXT * 3, 1)
        client.complete(TEXT * 3, 1, model=str(other))
        assert client.get("/v1/mlxkv/store")["store"] is None
    with Store(tmp_path / "store") as store:
        assert [entry.model for entry in store.blocks.entries()] == [str(talker)]


@pytest.mark.parametrize("more", [{}, {"seed": 7}], ids=["batched", "alone"])
def test_other_work_is_done_only_while_nobody_asks(talker, monkeypatch, more):
    monkeypatch.setattr(generation, "IDLE_SECONDS", 0.3)
    asked = []

    def work(self):
        asked.append(time.monotonic())
        return len(asked) < 3

    monkeypatch.setattr(module.Provider, "learn", work)
    with serving(talker, store=False) as client:
        for _ in range(6):
            client.complete(TEXT, 4, **more)
            time.sleep(0.1)
        last = time.monotonic()
        assert asked == []
        deadline = time.monotonic() + 20
        while len(asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert client.complete(TEXT, 1)[2] > 0
    assert asked[0] - last > 0.1


def test_other_work_that_fails_ends_nothing(talker, monkeypatch, caplog):
    monkeypatch.setattr(generation, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(module.Provider, "learn", lambda self: 1 / 0)
    with serving(talker, store=False) as client:
        time.sleep(0.3)
        assert client.complete(TEXT, 1)
    assert caplog.text.count("ZeroDivisionError") == 1


def test_a_request_has_one_line_in_the_log(talker, caplog):
    caplog.set_level(logging.INFO)
    with serving(talker, store=False) as client:
        client.chat("x")
        caplog.clear()
        client.chat(TEXT)
        list(client.stream("/v1/chat/completions", {"messages": user(TEXT), "max_tokens": 2}))
        client.get("/health")
        lines = [record.getMessage() for record in caplog.records if record.funcName != "keepalive_callback"]
    assert [line.split(":")[0].split()[:2] for line in lines] == [["prompt", "of"]] * 2

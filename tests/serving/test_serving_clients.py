"""Real clients of a real `mlxkv serve`: they are answered as by a server that keeps nothing, and told what was kept."""

import json
import os
import resource
import signal
import threading
import time
from itertools import count

import pytest
from servers import Client, ended, serving, started
from talking import CHATML, talker_folder, tokenizer

from mlxkv.errors import InputError

pytestmark = pytest.mark.slow

# As real templates do it: tools stand before the conversation, and a call that was made has no text.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    + CHATML.replace("m['content']", "m['content'] or m.get('tool_calls')")
)
FLAGS = ("--chat-template", TEMPLATE)
RULES = "You are a librarian who answers in few words and looks things up before answering. " * 6
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} a book in the library, by its title or by a part of it, and say where it stands",
            "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
        },
    }
    for name in ("find", "lend", "return")
]
NUMBERS = count(1)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return talker_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plain(talker):
    """A server that keeps nothing."""
    with serving(talker, *FLAGS, "--prompt-cache-size", "0", store=False) as client:
        yield client


@pytest.fixture(scope="module")
def server(talker, tmp_path_factory):
    """The URL of a server with a store, and its folder; one process for all."""
    store = tmp_path_factory.mktemp("store")
    process, client, _ = started(store, *FLAGS, "--prompt-cache-size", "100", model=talker)
    yield client.url, store
    code, said = ended(process, signal.SIGTERM)
    assert code == 0, said
    assert "Traceback" not in said


@pytest.fixture
def openai(server):
    from openai import OpenAI  # here, since it takes half a second in each process that collects tests

    with OpenAI(base_url=server[0] + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def number():
    """Six digits that no other prompt begins with."""
    return f"{next(NUMBERS) * 7919 % 10**6:06d}"


class Asked:
    """A client whose answers are compared with those of a server that keeps nothing, and what it is told is cached with its prompts."""

    def __init__(self, openai, plain, talker):
        self.openai, self.plain, self.talker = openai, plain, talker
        self.spoken, self.prompts, self.cached = tokenizer("chatml"), [], []
        self.spoken.chat_template = TEMPLATE

    def __call__(self, messages, most=12, **more):
        answer = self.openai.chat.completions.create(
            model=str(self.talker), messages=messages, max_tokens=most, temperature=0, **more
        )
        message, usage = answer.choices[0].message, answer.usage
        assert message.content == self.plain.chat(messages, most, **more)[0]
        assert not message.tool_calls
        self.check(messages, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens, **more)
        return {"role": "assistant", "content": message.content}

    def check(self, messages, tokens, cached, tools=None):
        """What a prompt has in common with one before was not computed again, and never all of it was cached."""
        prompt = self.spoken.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
        prompt = self.spoken.encode(prompt, add_special_tokens=False)
        assert tokens == len(prompt)
        begun = max((common(prompt, earlier) for earlier in self.prompts), default=0)
        assert min(begun, tokens - 1) <= cached < tokens
        self.prompts.append(prompt)
        self.cached.append(cached)


def common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture
def asked(openai, plain, talker):
    return Asked(openai, plain, talker)


def test_a_chat_is_answered_and_the_next_one_goes_on_from_it(asked, number):
    messages = [{"role": "system", "content": number + RULES}, user("Which book?")]
    answer = asked(messages)
    assert asked(messages) == answer
    assert asked.cached == [asked.cached[0], len(asked.prompts[0]) - 1]
    assert asked.cached[0] < 40
    asked([*messages, answer, user("And which then?")])


def test_a_stream_says_the_same_and_ends_with_what_was_used(asked, openai, talker, number):
    messages = [{"role": "system", "content": number + RULES}, user("Which book?")]
    expected = asked(messages, 20)["content"]
    chunks = list(openai.chat.completions.create(
        model=str(talker), messages=messages, max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ))  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert [chunk for chunk in chunks if chunk.choices][-1].choices[0].finish_reason in ("length", "stop")
    usage = chunks[-1].usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1 == len(asked.prompts[0]) - 1


def test_tools_are_read_once_also_by_a_model_that_cannot_call_them(asked, number):
    tools = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "name": f"find_{number}"}}, *TOOLS[1:]]
    read = len(json.dumps(tools)) - 100
    for text in ("Which book?", "Who reads here?"):
        asked([user(text)], tools=tools)
    assert asked.cached[0] < 200
    assert asked.cached[1] > read
    call = {"id": "1", "type": "function", "function": {"name": f"find_{number}", "arguments": '{"title": "Emma"}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "It stands on the third shelf."}
    answer = asked.openai.chat.completions.create(
        model=str(asked.talker),
        messages=[user("Which book?"), called, result],
        tools=tools,
        max_tokens=8,
        temperature=0,
    )
    assert answer.usage.prompt_tokens_details.cached_tokens > read
    assert answer.choices[0].message.content == asked.plain.chat([user("Which book?"), called, result], tools=tools)[0]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_langchain_chats_with_a_history(server, plain, talker, number, streamed, monkeypatch):
    import httpx
    from langchain_core.messages import HumanMessage
    from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
    from langchain_openai import ChatOpenAI

    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    history, texts, cached = [], ["Which book?", "And which then?", "Why?"], []
    with httpx.Client() as http:
        model = ChatOpenAI(
            model=str(talker), base_url=server[0] + "/v1", api_key="none", max_retries=0, http_client=http,
            temperature=0, max_tokens=12, stream_usage=True,
        )  # fmt: skip
        prompt = ChatPromptTemplate([("system", number + RULES), MessagesPlaceholder("history"), ("user", "{text}")])
        messages = [{"role": "system", "content": number + RULES}]
        for text in texts:
            given = {"history": history, "text": text}
            if streamed:
                first, *rest = (prompt | model).stream(given)
                answer = sum(rest, first)
            else:
                answer = (prompt | model).invoke(given)
            messages.append(user(text))
            assert answer.content == plain.chat(messages, 12)[0]
            cached.append(
                (answer.usage_metadata["input_token_details"]["cache_read"], answer.usage_metadata["input_tokens"])
            )
            messages.append({"role": "assistant", "content": answer.content})
            history += [HumanMessage(text), answer]
    assert cached[0][0] < 40
    for (found, _), (_, before) in zip(cached[1:], cached):
        assert found >= before  # all of the prompt before


def agent(ask, number):
    """Some turns with a long system prompt and tools; a branch, an edit in the middle, and an answer that is made again."""
    start = [{"role": "system", "content": number + RULES}]
    history = [*start]
    for text in ("Find Emma.", "Who lent it?", "Then look for another one by her.", "And one more."):
        history += [user(text), ask([*history, user(text)], tools=TOOLS)]
    ask(history[:-1], tools=TOOLS)  # again
    ask([*history[:5], user("Or rather something else by someone else.")], tools=TOOLS)  # a branch
    edited = [*history[:3], user("Who lent it, and when was that?"), *history[4:-1]]
    ask(edited, tools=TOOLS)
    return history


def test_an_agent_computes_only_what_is_new(asked, number):
    agent(asked, number)
    lengths = [len(prompt) for prompt in asked.prompts]
    assert all(length - cached < 250 for length, cached in zip(lengths[1:-1], asked.cached[1:-1]))
    assert asked.cached[4] == lengths[4] - 1


def test_servers_that_share_a_folder_outlive_a_kill_in_the_middle_of_a_write(asked, server, plain, talker, number):
    history = agent(asked, number)
    url, store = server
    words = (*FLAGS, "--prompt-cache-size", "100")
    waited_for(Client(url), lambda facts: facts["store"]["waiting"] == 0)
    second, client, _ = started(store, *words, model=talker)
    try:
        prompt = history[:-1]
        answer, tokens, cached = client.chat(prompt, 12, tools=TOOLS)
        assert answer == history[-1]["content"]
        assert cached >= tokens - 64
        assert client.get("/v1/mlxkv/store")["from_disk"] == cached
        longer = [*history, user("Read this: " + "a page of the book, and then another one. " * 60)]
        client.chat(longer, 1, tools=TOOLS)
    finally:
        second.kill()  # while that is written
        second.communicate()
    expected = plain.chat(longer, 12, tools=TOOLS)[0]
    assert asked(longer, tools=TOOLS)["content"] == expected
    third, client, _ = started(store, *words, model=talker)
    try:
        found = client.chat(longer, 12, tools=TOOLS), client.chat(prompt, 12, tools=TOOLS)
    finally:
        code, said = ended(third, signal.SIGTERM)
    assert [answer for answer, _, _ in found] == [expected, history[-1]["content"]]
    assert found[0][2] > tokens
    assert code == 0, said
    assert "Traceback" not in said


def waited_for(client, holds):
    deadline = time.monotonic() + 60
    while True:
        facts = client.get("/v1/mlxkv/store")
        if holds(facts):
            return facts
        assert time.monotonic() < deadline, facts
        time.sleep(0.05)


def test_many_clients_at_once_are_answered_as_one(openai, plain, talker, number):
    texts = [number + RULES[: 40 + 23 * i] for i in range(8)]
    expected, found = {text: plain.chat(text)[0] for text in texts}, []

    def ask(text):
        answer = openai.chat.completions.create(model=str(talker), messages=[user(text)], max_tokens=8, temperature=0)
        found.append((text, answer.choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert dict(found) == expected
    assert set(found) == set(expected.items())


def test_a_disk_that_is_full_costs_no_answer(talker, plain, tmp_path, number):
    """Files may not grow: as with a quota that is used up, which is there without being anyone but an ordinary user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    texts = [number + RULES, number[::-1] + RULES]
    expected = [plain.complete(text)[0] for text in texts]
    with serving(talker, exact=True, folder=tmp_path / "store") as client:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            assert client.complete(texts[0])[0] == expected[0]
            facts = waited_for(client, lambda facts: facts["store"]["waiting"] == 0)
            assert facts["store"]["tokens_written"] == 0
            assert not list((tmp_path / "store").rglob("*.tmp"))
            assert client.complete(texts[0])[0] == expected[0]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert client.complete(texts[1])[0] == expected[1]
    with serving(talker, exact=True, folder=tmp_path / "store") as client:
        answer, tokens, cached = client.complete(texts[1])
        assert answer == expected[1]
        assert cached >= tokens - 64


def test_a_store_that_others_have_written_into_changes_no_answer(talker, plain, tmp_path, number):
    store, text = tmp_path / "store", number + RULES
    expected = plain.complete(text)[0]
    with serving(talker, exact=True, folder=store) as client:
        client.complete(text)
    files = sorted(path for path in store.rglob("*.mlxkv"))
    assert files
    for i, path in enumerate(files):
        if i % 2:
            path.write_bytes(os.urandom(path.stat().st_size))
        else:
            path.unlink()
            path.symlink_to("/dev/zero")
    (store / "blocks" / "zz").mkdir()
    (store / "blocks" / "zz" / "notes.mlxkv").write_text("of someone else")
    with serving(talker, exact=True, folder=store) as client:
        assert client.complete(text)[0] == expected
    with serving(talker, exact=True, folder=store) as client:
        answer, tokens, cached = client.complete(text)
        assert answer == expected
        assert cached >= tokens - 64
    store.chmod(0o777)
    with pytest.raises(InputError), serving(talker, exact=True, folder=store):
        pass

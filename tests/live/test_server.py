"""mlx-lm's own server with live caches: the documentation's script, a real process, real requests."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import mlx.core as mx
import pytest
from conftest import tiny_model, tiny_tokens
from mlx_lm import generate, server

from mlxkv import lm
from mlxkv.live.seam import make_cache

ROOT = Path(__file__).parents[2]
(SCRIPT,) = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "live.md").read_text(), re.DOTALL)
             if "server.main" in block]  # fmt: skip
MODEL = ROOT / "benchmarks" / "checkpoints" / "qwen3"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    script = tmp_path_factory.mktemp("server") / "serve.py"
    assert 'method="int8"' in SCRIPT
    script.write_text(SCRIPT.replace('"int8"', '"kivi", recent=0, sinks=0'))  # which changes the text
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(script), "--model", str(MODEL), "--port", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except URLError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1/completions"
    process.terminate()
    process.wait()


def completed(address, prompt):
    request = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
    with urlopen(Request(address, json.dumps(request).encode()), timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_the_server_answers_as_generate_does_and_takes_up_a_conversation(address):
    model, tokenizer = lm.load(str(MODEL))
    model.set_dtype(mx.float16)  # as the server loads it
    prompt = "This module defines functions and classes. " * 3
    cache = make_cache(model, "kivi", recent=0, sinks=0)
    expected = generate(model, tokenizer, prompt, max_tokens=40, prompt_cache=cache)
    assert expected != generate(model, tokenizer, prompt, max_tokens=40)
    first = completed(address, prompt)
    assert first["choices"][0]["text"] == expected
    again = completed(address, prompt + expected + " It")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt)
    assert len(again["choices"][0]["text"]) > 20


def test_the_script_bounds_the_bytes_of_kept_conversations(monkeypatch):
    for name in ("make_prompt_cache", "LRUPromptCache", "main"):
        monkeypatch.setattr(server, name, getattr(server, name))
    monkeypatch.setattr(server, "main", lambda: None)
    exec(SCRIPT.replace("4_000_000_000", "20_000"), {})
    kept = server.LRUPromptCache(10)  # as mlx-lm's main calls it: with the number of conversations alone
    model = tiny_model("llama")
    for seed in range(4):
        cache, tokens = server.make_prompt_cache(model), tiny_tokens(60, seed=seed)
        lm.prefill(model, tokens, cache)
        kept.insert_cache("tiny", tokens, cache)
    size = sum(layer.nbytes for layer in cache)
    assert 0 < size < 20_000 < 4 * size
    assert len(kept) == 20_000 // size
    assert kept.nbytes <= 20_000

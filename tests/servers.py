"""Servers of mlxkv in a thread of the test or in a process of their own, and requests to them."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from mlxkv.serving.server import Options, Serving


class Client:
    """Requests to a server at an address."""

    def __init__(self, url, server=None, timeout=60):
        self.url, self.server, self.timeout = url, server, timeout

    def get(self, path):
        with urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path, body, timeout=None):
        request = Request(self.url + path, json.dumps(body).encode())
        with urlopen(request, timeout=timeout or self.timeout) as answer:
            return json.loads(answer.read())

    def refused(self, path, body):
        """The status and the error of a request that must fail."""
        try:
            raise AssertionError(f"answered with {self.post(path, body)}")
        except HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    def complete(self, prompt, most=8, **more):
        """Text, tokens of the prompt, and those that came from a cache."""
        answer = self.post("/v1/completions", {"prompt": prompt, "max_tokens": most, "temperature": 0, **more})
        return answer["choices"][0]["text"], *_counts(answer)

    def chat(self, messages, most=8, **more):
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        answer = self.post("/v1/chat/completions", {"messages": messages, "max_tokens": most, "temperature": 0, **more})
        return answer["choices"][0]["message"]["content"], *_counts(answer)

    def stream(self, path, body):
        """Events of a stream, one by one."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with urlopen(Request(self.url + path, json.dumps(body).encode()), timeout=60) as answer:
            for line in answer:
                text = line.decode().strip()
                if text.startswith("data: ") and text != "data: [DONE]":
                    yield json.loads(text[6:])


def _counts(answer):
    usage = answer["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def serving(model, *flags, **options):
    """A server in a thread, until the end of the block; its errors are raised there."""
    urls, failures = SimpleQueue(), []
    words = [*(["--model", str(model)] if model else []), "--port", "0", *map(str, flags)]
    server = Serving(words, Options(**options), ready=urls.put)

    def run():
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001  # raised by the test
            failures.append(error)
        urls.put(None)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        url = urls.get(timeout=60)
        yield Client(url, server) if url else None
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()
        if failures:
            raise failures[0]


def started(store, *words, model="miniature/qwen3"):
    """A process that listens, a client of it, and what it said."""
    command = [
        sys.executable,
        "-m",
        "mlxkv",
        "serve",
        "--model",
        model,
        "--port",
        "0",
        "--exact",
        "--store",
        store,
        *words,
    ]
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    said = ""
    while not (url := re.search(r"listening on (http://127.0.0.1:\d+)/v1", said)):
        line = process.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    return process, Client(url[1]), said


def ended(process, *signals, pause=0.02):
    """The exit code after signals, and the rest of what was said."""
    for number in signals:
        process.send_signal(number)
        time.sleep(pause)
    try:
        said = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said

"""Servers in processes of their own, and clients that ask them over HTTP and look at the clock."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlxkv.bundled import models

STARTING = 180.0  # seconds until a server has to answer
ANSWERING = 300.0  # seconds until an answer has to come
Messages = list[dict[str, str]]


class Answer(NamedTuple):
    """What a server answered.

    Parameters
    ----------
    text
        The answer.
    first
        Seconds until its first piece came.
    seconds
        Seconds until it was complete.
    prompt, cached, tokens
        Tokens of the prompt, those of them that the server did not compute, and those of the answer.
    error
        Why there is none; empty where there is.
    pieces
        Seconds until each piece of the text came.
    """

    text: str = ""
    first: float = 0.0
    seconds: float = 0.0
    prompt: int = 0
    cached: int = 0
    tokens: int = 0
    error: str = ""
    pieces: tuple[float, ...] = ()


class Server(NamedTuple):
    """A running server: where it listens, and its process."""

    port: int
    process: subprocess.Popen[bytes]

    def ask(self, said: str | Messages, tokens: int) -> Answer:
        """Send a prompt, or messages, as a stream and greedily; return the answer, or the error that came in its place."""
        start = time.perf_counter()
        try:
            return _read(self.port, said, tokens, start)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            return Answer(seconds=time.perf_counter() - start, error=f"{type(error).__name__}: {error}"[:200])

    def settle(self, most: float = 60.0) -> None:
        """Wait until the process has done what it does behind an answer: stored it and computes no more, or for `most` seconds."""
        used, give_up = self._seconds(), time.monotonic() + most
        while time.monotonic() < give_up:
            time.sleep(0.25)
            before, used = used, self._seconds()
            if used - before < 0.05 and not self._waiting():
                break

    def _waiting(self) -> int:
        """Return how many caches mlxkv's server has still to store; 0 where it is another server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/v1/mlxkv/store")
            response = connection.getresponse()
            found = json.loads(response.read()) if response.status == 200 else {}
            return int((found.get("store") or {}).get("waiting", 0))
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _seconds(self) -> float:
        """Return how long its threads have run so far; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def written(self) -> int | None:
        """Return the bytes that the process has written so far, to files and sockets; None where the system does not say."""
        return written_bytes(self.process.pid)

    def peak_memory(self) -> int | None:
        """Return the most bytes of memory that the process has held; None where the system does not say."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def written_bytes(process: int) -> int | None:
    """Return the bytes that a process has handed to write calls so far; None where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/io").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return int(fields[fields.index("wchar:") + 1])


@contextmanager
def running(
    words: Sequence[object], environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[Server]:
    """Start `python -m WORDS --port N` and wait until it has answered; at the end ask it to stop, and wait until it has.

    Parameters
    ----------
    words
        The module and its arguments.
    environment
        Variables beside those of this process.
    log
        File that its output is appended to; None for nowhere.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *map(str, words), "--port", str(port)]
    with open(log or os.devnull, "ab") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=output,
            preexec_fn=_heed_interrupts,
        )
    server = Server(port, process)
    try:
        _wait(server, " ".join(command), log)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _heed_interrupts() -> None:
    """Undo what a shell does to programs in its background, which ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(server: Server, command: str, log: Path | None) -> None:
    """Wait until the model is loaded: until a prompt of a few tokens has an answer."""
    give_up = time.monotonic() + STARTING
    while (answer := server.ask("1 2 3", 1)).error:
        if server.process.poll() is not None or time.monotonic() > give_up:
            said = log.read_text(encoding="utf-8", errors="replace")[-1_000:] if log else ""
            raise RuntimeError(f"{command} does not answer: {answer.error}\n{said}")
        time.sleep(0.1)


def _read(port: int, said: str | Messages, tokens: int, start: float) -> Answer:
    path, content = (
        ("/v1/completions", {"prompt": said}) if isinstance(said, str) else ("/v1/chat/completions", {"messages": said})
    )
    body = {
        **content,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWERING)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(200)!r}")
        return _stream(response, start)
    finally:
        connection.close()


def _stream(response: http.client.HTTPResponse, start: float) -> Answer:
    """Read the events of an answer. Raises ValueError where it ends early."""
    text, first = "", 0.0
    pieces: list[float] = []
    usage: dict[str, Any] = {}
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            details = usage.get("prompt_tokens_details") or {}
            return Answer(
                text, first, time.perf_counter() - start, usage["prompt_tokens"], details.get("cached_tokens", 0),
                usage["completion_tokens"], "", tuple(pieces),
            )  # fmt: skip
        first = first or time.perf_counter() - start
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        said = "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in event["choices"]
        )
        pieces += [time.perf_counter() - start] if said else []
        text += said
    raise ValueError("the answer ends early")


class Load(NamedTuple):
    """What clients that ask at once got.

    Parameters
    ----------
    clients
        How many they are.
    requests, errors
        Requests that were answered, and that were not.
    seconds
        From the first to the last.
    first
        Seconds until an answer's first piece came, of each request answered, sorted.
    asked, cached
        Tokens of the prompts, and those of them not computed.
    """

    clients: int
    requests: int
    errors: int
    seconds: float
    first: list[float]
    asked: int
    cached: int


def load(server: Server, conversations: Sequence[Callable[[Callable[[str | Messages, int], Answer]], None]]) -> Load:
    """Run conversations at once, each in a thread of its own; each is a function that is handed one to ask the server by."""
    answers: list[Answer] = []

    def ask(said: str | Messages, tokens: int) -> Answer:
        answers.append(server.ask(said, tokens))
        return answers[-1]

    start = time.perf_counter()
    with ThreadPoolExecutor(len(conversations)) as pool:
        for _ in pool.map(lambda conversation: conversation(ask), conversations):
            pass
    seconds, good = time.perf_counter() - start, [answer for answer in answers if not answer.error]
    first = sorted(answer.first for answer in good)
    asked, cached = sum(answer.prompt for answer in good), sum(answer.cached for answer in good)
    return Load(len(conversations), len(good), len(answers) - len(good), seconds, first, asked, cached)


def float32_folder(name: str, folder: Path) -> Path:
    """Copy a bundled model's folder with its weights in float32, which is the fast type of CPUs, for servers of any kind.

    Parameters
    ----------
    name
        The model's.
    folder
        Where the copy is made.
    """
    source, target = models.model_path(name), folder / name.replace("/", "-")
    assert source is not None
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in source.glob("*.safetensors"):
        weights = mx.load(str(path))
        assert isinstance(weights, dict)
        wide = {
            key: value.astype(mx.float32) if value.dtype in (mx.bfloat16, mx.float16) else value
            for key, value in weights.items()
        }
        mx.save_safetensors(str(target / path.name), wide, {"format": "mlx"})
    return target

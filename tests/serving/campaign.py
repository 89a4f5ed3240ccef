"""Servers under load, and servers killed while they work: `make storm`, which is no part of the default tests.

`campaign.py storm MINUTES` asks one server by 32 clients at once; `campaign.py kills COUNT` kills a server with
SIGKILL so many times, at any moment and in every second case right before or in the middle of a write, while clients ask it.
Each prints a JSON object and fails where an answer was not that of a server without a store, a request failed, a store could not
be read, or its folder ever took more than its bound.
"""

# isort: off
import mlxkv  # noqa: F401  # before mlx.core: it loads OpenBLAS

# isort: on
import json
import logging
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from killing import Operations, imported, in_child
from servers import Client

from mlxkv.serving.server import Options, Serving
from mlxkv.store.index import BlockStore

CLIENTS = 32
PATIENCE = 600  # seconds until a request that has no answer is an error: 32 share two cores, maybe with others
BOUND = 8 * 2**20  # of the folder in which servers are killed
FAVOURITES = 6  # texts that half of all requests are about
STEPS = 300  # operations on files until a kill, at most
KINDS = ("miniature", "lfm2", "gemma3_text")  # every token kept; states that cannot be cut; windows


# What is asked


def prompts(count, tokens, seed):
    """Texts of characters in conversations: each goes on as an earlier one does, and then otherwise."""
    source, made = random.Random(seed), []
    words = ("rabbit", "reads", "an", "old", "book", "and", "finds", "no", "door", "in", "this", "house")
    while len(made) < count:
        earlier = source.choice([*made[-12:], ""])[: source.randrange(tokens)]
        added = f"{source.randrange(10**6):06d} " + " ".join(source.choices(words, k=source.randrange(20, tokens // 5)))
        made.append((earlier + added)[:tokens])
    return made


class Asking:
    """Clients that ask until told to stop, and what came of it."""

    def __init__(self, client, expected, alive, clients, seed, most):
        self.client, self.expected, self.alive, self.most = client, expected, alive, most
        self.stopped, self.wrong, self.errors, self.requests, self.tokens, self.cached = (
            threading.Event(),
            [],
            [],
            0,
            0,
            0,
        )
        self.slowest, self._lock = 0.0, threading.Lock()
        self.threads = [
            threading.Thread(target=self._ask, args=(random.Random(f"{seed} {number}"),), daemon=True)
            for number in range(clients)
        ]
        for thread in self.threads:
            thread.start()

    def _ask(self, source):
        while not self.stopped.is_set():
            texts, began = list(self.expected), time.monotonic()
            prompt = source.choice(texts[:FAVOURITES] if source.random() < 0.5 else texts)
            try:
                text, tokens, cached = self.client.complete(prompt, self.most)
            except Exception as error:  # noqa: BLE001  # whatever it is, a server that was killed may be its reason
                if self._is_over(PATIENCE / 60):
                    return
                with self._lock:
                    self.errors.append(repr(error))
                continue
            with self._lock:
                self.requests, self.tokens, self.cached = self.requests + 1, self.tokens + tokens, self.cached + cached
                self.slowest = max(self.slowest, time.monotonic() - began)
                if text != self.expected[prompt]:
                    self.wrong.append((prompt[:40], cached, text, self.expected[prompt]))

    def _is_over(self, seconds):
        """Whether the server ends within some time, which a process that was killed may take on a busy machine."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.stopped.is_set() or not self.alive():
                return True
            time.sleep(0.05)
        return False

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(PATIENCE)
        return self


# What a folder takes


def taken(folder):
    """Bytes of a disk that all files and folders take, as `du` counts them."""
    total, waiting = 0, [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    try:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(entry.path)
                    except OSError:  # it has gone meanwhile
                        continue
        except OSError:
            continue
    return total


@contextmanager
def measured_folder(folder):
    """The most bytes that a folder took, looked at again and again by a process of its own."""
    shared = mmap.mmap(-1, 16)
    child = os.fork()
    if not child:
        while True:
            most, looks = struct.unpack("qq", shared[:16])
            shared[:16] = struct.pack("qq", max(most, taken(folder)), looks + 1)
            time.sleep(0.01)
    try:
        yield lambda: struct.unpack("qq", shared[:16])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Models and servers


def make_models(folder):
    """Float32 models, whose text does not depend on how many are computed at once."""
    import mlx.core as mx
    from talking import talker_folder

    from mlxkv.bundled import miniatures

    for kind in KINDS[1:]:
        talker_folder(folder / kind, kind)
    shutil.copytree(miniatures.FOLDER / "qwen3", folder / "miniature")
    weights = mx.load(str(folder / "miniature" / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "miniature" / "model.safetensors"),
        {k: v.astype(mx.float32) for k, v in weights.items()},
        {"format": "mlx"},
    )


class Forked:
    """A server in a process forked from this one, which never runs MLX itself: it listens after a moment."""

    def __init__(self, model, log, operations=None, **options):
        reads, writes = os.pipe()
        self.pid, self.status, self._asking = os.fork(), None, threading.Lock()
        if not self.pid:
            status = 1
            try:
                os.close(reads)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
                sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # until the process is killed
                logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
                write = os.write
                if operations:
                    operations.install()
                words = ["--model", str(model), "--port", "0", "--prompt-cache-size", "2"]
                server = Serving(
                    words,
                    Options(exact=True, calibrate=False, **options),
                    lambda url: write(writes, url.encode() + b"\n"),
                )
                try:
                    server.run()
                except BaseException:
                    logging.exception("it ended")
                    raise
                write(writes, json.dumps([list(sys.modules), operations and operations.count]).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writes)
        self._told = os.fdopen(reads, "rb")
        self.client = Client(self._told.readline().decode().strip(), timeout=PATIENCE)

    def alive(self):
        with self._asking:  # a process that has ended tells only once
            if self.status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self.status = os.waitstatus_to_exitcode(status) if pid else None
            return self.status is None

    def end(self, number=signal.SIGTERM):
        """What it said at its end: modules, and operations on files."""
        if self.alive():
            os.kill(self.pid, number)
            while self.alive():
                time.sleep(0.01)
        with self._told:
            said = self._told.read()
        return json.loads(said) if said else None


def answers(model, texts, log, most):
    """What a server without a store, which computes every prompt, says to each text."""
    server = Forked(model, log, store=False)
    try:
        return {text: server.client.complete(text, most)[0] for text in texts}
    finally:
        modules, _ = server.end()
        imported(modules)


def damaged(folder):
    """What is damaged in a store, asked in a process of its own."""

    def check():
        with BlockStore(folder, BOUND) as store:
            found = store.verify()
            return found.blocks, found.damaged

    return in_child(check)[0]


# Campaigns


def kills(count, seed):
    """Servers of one store after the other, each killed while four clients ask."""
    source, found = random.Random(seed), {"kills": 0, "at writes": 0, "in half a write": 0}
    totals = dict.fromkeys(("requests", "tokens", "cached"), 0)
    wrong, errors, unreadable, blocks = [], [], [], 0
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        in_child(make_models, room)
        expected = {kind: answers(room / kind, prompts(60, 800, kind), room / "log", 6) for kind in KINDS}
        (room / "store").mkdir(0o700)
        whole = Forked(room / KINDS[0], room / "log", Operations(), folder=room / "store", limit=BOUND)
        for text in list(expected[KINDS[0]])[:FAVOURITES]:
            whole.client.complete(text, 6)
        modules, operations_of_all = whole.end()
        imported(modules)
        with measured_folder(room / "store") as most:
            for number in range(count):
                kind, at_write = KINDS[number % 3], number % 2 == 1
                operations = Operations(1 + source.randrange(STEPS), half=source.random() < 0.5) if at_write else None
                server = Forked(room / kind, room / "log", operations, folder=room / "store", limit=BOUND)
                if server.client.url:  # else it was killed before it listened
                    asking = Asking(server.client, expected[kind], server.alive, 4, f"{seed} {number}", 6)
                    until = time.monotonic() + (20 if at_write else source.uniform(0.3, 6))
                    while server.alive() and time.monotonic() < until:
                        time.sleep(0.005)
                    died = not server.alive()
                    server.end(signal.SIGKILL)
                    asking.stop()
                    wrong, errors = wrong + asking.wrong, errors + asking.errors
                    for key in totals:
                        totals[key] += getattr(asking, key)
                else:
                    server.end(signal.SIGKILL)
                    died = True
                if server.status != -signal.SIGKILL:
                    errors.append(f"it ended by itself with {server.status}")
                found["kills"] += 1
                found["at writes"] += at_write and died
                found["in half a write"] += at_write and died and operations.half
                try:
                    blocks, bad = damaged(room / "store")
                    unreadable += bad
                except Exception as error:  # noqa: BLE001  # told at the end
                    unreadable.append(repr(error))
            peak, looks = most()
        told = re.findall(r"^(?:WARNING|ERROR|CRITICAL|\w*Error).*", (room / "log").read_text(), re.MULTILINE)
    return {
        **found, "operations without a kill": operations_of_all, **totals, "blocks at the end": blocks, "wrong": wrong, "errors": errors, "unreadable": unreadable,
        "bound": BOUND, "most bytes": peak, "looks": looks, "warnings": sorted(set(told))[:20],
    }  # fmt: skip


def storm(minutes, seed):
    """One server, asked by all clients at once; its memory is looked at all the time."""
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        in_child(make_models, room)
        expected = answers(room / "miniature", prompts(96, 300, seed), room / "log", 8)
        limit, samples = 32 * 2**20, []
        (room / "store").mkdir(0o700)
        command = [
            sys.executable,
            "-m",
            "mlxkv",
            "serve",
            "--model",
            room / "miniature",
            "--port",
            "0",
            "--exact",
            "--store",
            room / "store",
        ]
        command += ["--store-max", "32MiB", "--prompt-cache-bytes", "16MB", "--no-calibrate"]
        with measured_folder(room / "store") as most, (room / "said").open("w") as said:
            process = subprocess.Popen(list(map(str, command)), stderr=said, env={**os.environ, "COLUMNS": "200"})
            try:
                while not (url := re.search(r"listening on (http://\S+)/v1", (room / "said").read_text())):
                    assert process.poll() is None, (room / "said").read_text()
                    time.sleep(0.1)
                client = Client(url[1], timeout=PATIENCE)
                asking = Asking(client, expected, lambda: process.poll() is None, CLIENTS, seed, 8)
                began = time.monotonic()
                while time.monotonic() - began < 60 * minutes and process.poll() is None:
                    samples.append(resident(process.pid))
                    time.sleep(0.5)
                asking.stop()
                facts = client.get("/v1/mlxkv/store")
                process.terminate()
                code = process.wait(120)
            finally:
                process.kill()
            peak, looks = most()
            unreadable = damaged(room / "store")[1]
        told = re.findall(r".*(?:Traceback|WARNING|ERROR|warning|rror:).*", (room / "said").read_text())
    third = len(samples) // 3
    return {
        "clients": CLIENTS, "seconds": time.monotonic() - began, "requests": asking.requests, "tokens": asking.tokens,
        "cached": asking.cached, "slowest": asking.slowest, "wrong": asking.wrong, "errors": asking.errors,
        "unreadable": unreadable, "exit code": code, "bound": limit, "most bytes": peak, "looks": looks,
        "memory, first, second and last third": [median(part) for part in (samples[:third], samples[third:-third], samples[-third:])],
        "store": facts, "warnings": sorted(set(told))[:20],
    }  # fmt: skip


def resident(pid):
    """Bytes of memory that a process has now."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return 1024 * int(found or 0)


def main(name, number="1", seed="0"):
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if name == "kills" and sys.platform == "darwin":
        print("servers are killed on Linux alone: a forked process cannot use Metal")
        return 0
    facts = kills(int(number), seed) if name == "kills" else storm(float(number), seed)
    print(json.dumps(facts, indent=1))
    bad = facts["wrong"] or facts["errors"] or facts["unreadable"] or facts["most bytes"] > facts["bound"]
    if name == "storm":
        _, before, after = facts["memory, first, second and last third"]
        bad = bad or facts["exit code"] or after > 1.1 * before
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

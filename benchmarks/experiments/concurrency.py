"""Do writers and readers of one file get in each other's way? Pairs of writers, and readers beside them, as processes.

In each round two writers start at once on one file, or one folder of artifacts, while two readers read it over and over. A read
is right if it finds exactly what one of the writers or the state before left. A writer that says it is done has lost its
update if no order of the two leads to what is there afterwards; it may refuse to go on from a file that the other one has changed. Any
other error is a false one. Quick: 40 rounds.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.schema import Outcome, Result
from benchmarks.tables import table
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, read_dump, write_dump
from mlxkv.errors import MismatchError
from mlxkv.io.atomic import atomic_write
from mlxkv.io.container import Reader
from mlxkv.spec import CacheSpec, Layer, Slot

PHASE = 8
READERS, OLD = 2, 700
SPEC = CacheSpec("toy", (Layer(Slot("keys", 2, 8), Slot("values", 2, 8)),) * 4)
# What the two writers do to a file of 700 tokens, and how many tokens may be there afterwards by what they said.
KINDS: dict[str, tuple[tuple[str, str], dict[tuple[str, str], set[int]]]] = {
    "two appends": (("append 1000", "append 1300"), {("done", "done"): {1300}, ("refused", "done"): {1300}}),
    "the same append twice": (("append 1300", "append 1300"), {("done", "done"): {1300}}),
    "an append and a new file": (
        ("append 1300", "write 900"),
        {("done", "done"): {900, 1300}, ("refused", "done"): {900}},
    ),
    "an append and a shorter file": (
        ("append 1000", "write 1300"),
        {("done", "done"): {1300}, ("refused", "done"): {1300}},
    ),
    "two new files": (("write 900", "write 1300"), {("done", "done"): {900, 1300}}),
    "artifacts replaced twice": (("calibrate 1", "calibrate 2"), {("done", "done"): {1, 2}}),
}


def run(quick: bool) -> Outcome:
    rounds = 40 if quick else 500
    context = get_context("spawn")
    samples = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = prepare(folder)
        start, stop = context.Barrier(3 + READERS), context.Event()
        workers = []
        for role in (write, write, *[read] * READERS):
            here, there = context.Pipe()
            process = context.Process(target=role, args=(folder, known, there, start, stop), daemon=True)
            process.start()
            workers.append((process, here))
        for number in range(rounds):
            kind = list(KINDS)[number % len(KINDS)]
            samples.append({"kind": kind, **one_round(folder, known, kind, workers, start, stop)})
        for process, connection in workers:
            connection.send(None)
            process.join()
    return Outcome({"rounds": rounds, "readers": READERS}, samples, summarise(samples))


def prepare(folder: Path) -> dict[Any, Any]:
    """Write dumps, artifacts and files of every length; return the lengths by file and the numbers by fingerprint."""
    codec = None
    for length in (OLD, 900, 1000, 1300):
        write_dump(folder / f"{length}.npz", toy(length))
        codec = codec or CacheCodec(calibrate([folder / f"{OLD}.npz"], KVTCConfig(compression_ratio=4)))
        (folder / f"{length}.mlxkv").write_bytes(codec.compress_dump(toy(length)))
    assert codec is not None
    codec.artifacts.save(folder / "artifacts")
    known: dict[Any, Any] = {}
    for number in range(3):
        found = calibrate([folder / f"{OLD}.npz"], KVTCConfig(compression_ratio=4 + number))
        found.save(folder / f"artifacts{number}")
        known[found.fingerprint] = number
    return known | {(folder / f"{length}.mlxkv").read_bytes(): length for length in (OLD, 900, 1000, 1300)}


def toy(length: int) -> KVDump:
    """Return a made-up cache; one of fewer tokens is the beginning of one of more."""
    random = np.random.default_rng(0)
    k, v = (random.standard_normal((4, 1, 2, 1300, 8)).astype(np.float16)[..., :length, :] for _ in range(2))
    return KVDump(k, v, SPEC, np.arange(length, dtype=np.int32)[None], "toy", "toy.made-up")


def one_round(
    folder: Path, known: dict[Any, Any], kind: str, workers: list[tuple[Any, Connection]], start: Barrier, stop: Event
) -> dict[str, Any]:
    """Let two writers and the readers loose on one path; return what they said and what is there afterwards."""
    tasks, allowed = KINDS[kind]
    place = folder / "shared"
    place.mkdir()
    target = place / "a"
    if kind.startswith("artifacts"):
        CalibrationArtifacts.from_dir(folder / "artifacts0").save(target)
    else:
        target.write_bytes((folder / f"{OLD}.mlxkv").read_bytes())
    stop.clear()
    for (_, connection), task in zip(workers, [*tasks, *["read"] * READERS], strict=True):
        connection.send((task, kind))
    start.wait()
    began = perf_counter()
    said = [connection.recv() for _, connection in workers[:2]]
    seconds = perf_counter() - began
    stop.set()
    reads = [connection.recv() for _, connection in workers[2:]]
    left = look(target, known, kind)
    first, second = (word if word in ("done", "refused") else "error" for word in said)
    errors = [word for word in said if word not in ("done", "refused")]
    errors += [error for _, found in reads for error in found["errors"]]
    names = os.listdir(place)
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.rmdir()
    return {
        "said": [first, second],
        "left": left,
        "lost": "error" not in (first, second) and left not in allowed.get((first, second), set()),
        "mixed": sum(found["mixed"] for _, found in reads) + (left is None),
        "errors": errors,
        "reads": sum(count for count, _ in reads),
        "litter": len(names) - 1,
        "seconds": round(seconds, 4),
    }


def look(target: Path, known: dict[Any, Any], kind: str) -> int | None:
    """Return which of the known contents is at a path, with everything checked; None for any other."""
    if kind.startswith("artifacts"):
        return known.get(CalibrationArtifacts.from_dir(target).fingerprint)
    with Reader(target) as reader:
        reader.verify()
        reader._file.seek(0)
        return known.get(reader._file.read())


def write(folder: Path, known: dict[Any, Any], tasks: Connection, start: Barrier, stop: Event) -> None:
    """Be a writer: do tasks until there are no more."""
    codec = CacheCodec(CalibrationArtifacts.from_dir(folder / "artifacts"))
    target = folder / "shared" / "a"
    while task := tasks.recv():
        word, number = task[0].split()
        dump = read_dump(folder / f"{number}.npz") if word != "calibrate" else None
        artifacts = CalibrationArtifacts.from_dir(folder / f"artifacts{number}") if dump is None else None
        start.wait()
        try:
            if artifacts is not None:
                artifacts.save(target, overwrite=True)
            elif word == "append" and dump is not None:
                codec.append_dump(target, dump)
            elif dump is not None:
                blob = codec.compress_dump(replace(dump))
                with atomic_write(target) as file:
                    file.write(blob)
            tasks.send("done")
        except MismatchError:
            tasks.send("refused")
        except Exception as error:  # noqa: BLE001  # counted
            tasks.send(f"{word}: {error!r}")


def read(folder: Path, known: dict[Any, Any], tasks: Connection, start: Barrier, stop: Event) -> None:
    """Be a reader: read until the writers are done, at least once, and tell what was wrong."""
    while task := tasks.recv():
        start.wait()
        reads, mixed, errors = 0, 0, []
        while not reads or not stop.is_set():
            reads += 1
            try:
                mixed += look(folder / "shared" / "a", known, task[1]) is None
            except Exception as error:  # noqa: BLE001  # counted
                errors.append(f"read: {error!r}")
        tasks.send((reads, {"mixed": mixed, "errors": errors}))


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each kind of round, and one for all."""
    rows = []
    for kind in [*KINDS, "all"]:
        own = [sample for sample in samples if kind in (sample["kind"], "all")]
        said = Counter(word for sample in own for word in sample["said"])
        rows.append(
            {
                "kind": kind,
                "rounds": len(own),
                "done": said["done"],
                "refused": said["refused"],
                "lost": sum(sample["lost"] for sample in own),
                "mixed": sum(sample["mixed"] for sample in own),
                "false_errors": sum(len(sample["errors"]) for sample in own),
                "reads": sum(sample["reads"] for sample in own),
                "litter": sum(sample["litter"] for sample in own),
            }
        )
    return rows


def section(result: Result) -> str:
    every = result["summary"][-1]
    found = (
        f"Of {every['rounds']} pairs of writers, {every['lost']} lost an update that was said to be done, and"
        f" {every['false_errors']} writers or readers had an error without reason; {every['mixed']} of {every['reads']:,} reads"
        f" beside them found anything but one writer's whole content. {every['refused']} writers refused to go on from a file that the other"
        " had changed."
    )
    heads = ("two writers at once", "pairs", "done", "refused", "lost", "reads", "mixed", "false errors")
    keys = ("kind", "rounds", "done", "refused", "lost", "reads", "mixed", "false_errors")
    return f"{found}\n\n{table(heads, [[str(row[key]) for key in keys] for row in result['summary']])}"

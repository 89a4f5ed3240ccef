"""Write paths killed after each of their operations on files, one after the other, in processes forked from this one.

`python killing.py FOLDER SCENARIO...` prints a JSON object: for each scenario how many operations it has, and what went wrong.
The forking process itself never uses MLX, whose threads a fork would not take along.
"""

import builtins
import fcntl
import gc
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import sqlite3
import sys
import traceback
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from mlxkv.io import folders

really_open = builtins.open
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = ("ftruncate", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "chmod", "fchmod")
STATEMENTS = (
    "BEGIN",
    "COMMIT",
    "INSERT",
    "UPDATE",
    "DELETE",
    "CREATE",
    "PRAGMA journal_mode =",
    "PRAGMA user_version =",
    "PRAGMA wal",
)


class Operations:
    """Counts operations on files, and ends the process before one of them, or in the middle of it if it writes."""

    def __init__(self, last=None, half=False, folder=None):
        self.last, self.half, self.count, self.writes = last, half, 0, []
        self.folder, self.before = folder, []  # what a folder holds before each operation

    def step(self, half_of=None):
        self.count += 1
        if self.folder:
            self.before.append(held(self.folder))
        if half_of:
            self.writes.append(self.count)
        if self.count == self.last:
            if self.half and half_of:
                half_of()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, call):
        def counting(*arguments, **named):
            self.step()
            return call(*arguments, **named)

        return counting

    def install(self):
        """Replace what changes files in this process, which is a forked one."""
        really_os_open, really_fdopen, pwrite = os.open, os.fdopen, os.pwrite
        operations = self

        class Counted(io.FileIO):
            def write(self, data):
                first = memoryview(data)[: len(data) // 2]
                operations.step(lambda: super(Counted, self).write(first))
                return super().write(data)

        def os_open(path, flags, *arguments, **named):
            if flags & WRITES:
                operations.step()
            return really_os_open(path, flags, *arguments, **named)

        def any_open(file, mode="r", buffering=-1, *arguments, **named):
            if not set(mode) & set("wax+"):
                return really_open(file, mode, buffering, *arguments, **named)
            operations.step()
            assert "b" in mode, "text is not counted"
            return fdopen(file, mode, buffering)

        def fdopen(file, mode="r", buffering=-1):
            if not set(mode) & set("wax+"):
                return really_fdopen(file, mode, buffering)
            raw = Counted(file, mode)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        def half_pwrite(file, data, offset):
            operations.step(lambda: pwrite(file, memoryview(data)[: len(data) // 2], offset))
            return pwrite(file, data, offset)

        builtins.open = io.open = any_open
        os.open, os.fdopen, os.pwrite = os_open, fdopen, half_pwrite
        for name in CALLS:
            setattr(os, name, self.counted(getattr(os, name)))
        fcntl.flock, folders.exchange = self.counted(fcntl.flock), self.counted(folders.exchange)
        really_connect = sqlite3.connect

        def connect(*arguments, **named):
            connection = really_connect(*arguments, **named)
            connection.set_trace_callback(lambda text: text.startswith(STATEMENTS) and operations.step())
            return connection

        sqlite3.connect = connect


@contextmanager
def nothing_written():
    """Make this process a reader of a read-only disk."""

    def refused(*_, **__):
        raise AssertionError("a reader wrote")

    kept = {name: getattr(os, name) for name in (*CALLS, "pwrite", "write", "open")}

    def os_open(path, flags, *arguments, **named):
        return refused() if flags & WRITES else kept["open"](path, flags, *arguments, **named)

    try:
        for name in kept:
            setattr(os, name, refused)
        os.open = os_open
        yield
    finally:
        for name, call in kept.items():
            setattr(os, name, call)


def in_child(function, *arguments, operations=None):
    """Run a function in a forked process; return its result, or None where it was killed."""
    reads, writes = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reads)
            sys.stdout = really_open(os.devnull, "w")
            write = os.write
            if operations:
                operations.install()
            try:
                result = function(*arguments), None
            except BaseException:  # noqa: BLE001  # told by the process that forked
                result = None, traceback.format_exc()
            data = pickle.dumps((result, operations and (operations.before, operations.writes)))
            while data:
                data = data[write(writes, data) :]
            status = 0
        finally:
            os._exit(status)
    os.close(writes)
    with open(reads, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    (result, error), operations = pickle.loads(data)
    if error:
        raise RuntimeError(error)
    return result, operations


def held(folder):
    """Return a fingerprint of all that a folder holds: names, modes and bytes."""
    found = hashlib.blake2b()
    for root, folders_in, files in os.walk(folder):
        folders_in.sort()
        for name in sorted(files + folders_in):
            path = os.path.join(root, name)
            found.update(f"{path}\0{os.stat(path).st_mode}\0".encode())
            if name in files:
                with really_open(path, "rb") as file:
                    found.update(file.read())
    return found.digest()


def kills(before, writes):
    """Return the operations to be killed at, each with whether in its middle: of those before which nothing changes the last."""
    changing = [last for last, (now, then) in enumerate(zip(before, [*before[1:], None]), 1) if now != then]
    every = sorted([*((last, False) for last in changing), *((last, True) for last in writes)])
    return sorted({*every[::STRIDE], every[-1]})


def writing(scenario, folder):
    """Write, and return the names of the modules that are imported then."""
    scenario.write(folder)
    return list(sys.modules)


def imported(modules):
    """Import here, once, what each forked process would import again, which takes half of its time; none of it runs MLX."""
    for name in modules:
        if name not in sys.modules:
            with suppress(ImportError):  # a module that has no file of its own
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a forked process then shares these objects' memory for good


class Scenario:
    """A write path: `prepare` makes the state before, `write` writes, `read` tells what a reader finds."""

    names = ("a",)  # in the folder after a complete write
    changes = True  # what a reader finds
    uses_mlx = False

    def prepare(self, folder):
        """Make the state that the write begins with."""

    def write(self, folder):
        """Write, as a user's process does."""
        raise NotImplementedError

    def write_again(self, folder):
        """Write in the process that follows a killed one."""
        self.write(folder)

    def read(self, folder):
        """Return what a reader finds, as anything that can be compared; it must write nothing."""
        raise NotImplementedError


def quiet(function, *arguments):
    """Run a function in this process, without what it prints."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        function(*arguments)


def fresh(folder):
    """Return a new, empty folder in place of the one before."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


STRIDE = int(os.environ.get("KILL_STRIDE", "1"))  # kills from one that is made to the next


def every_kill(scenario, folder):
    """Kill a scenario's write after each operation that changes a file, or every few; return the number of operations, and all that is wrong."""
    wrong = []
    scenario.prepare(fresh(folder))
    before = scenario.read(folder)
    modules, (found, writes) = in_child(writing, scenario, folder, operations=Operations(folder=folder))
    imported(modules)
    count, after = len(found), scenario.read(folder)
    if sorted(os.listdir(folder)) != sorted(scenario.names):
        wrong.append(f"uninterrupted, it leaves {os.listdir(folder)}")
    if (before != after) != scenario.changes:
        wrong.append("it changes nothing, or something")
    seen = set()
    for last, half in kills(found, writes):
        scenario.prepare(fresh(folder))
        if in_child(scenario.write, folder, operations=Operations(last, half)) is not None:
            wrong.append(f"it was not killed at {last} of {count}")
        for step in ("the kill", "the next write"):
            try:
                with nothing_written():
                    found = scenario.read(folder)
                if found not in (before, after)[step != "the kill" :]:
                    wrong.append(f"{last}: after {step} a reader finds neither the old nor the new: {found!r:.200}")
                seen.add(found == after)
                if step == "the kill":
                    in_child(scenario.write_again, folder) if scenario.uses_mlx else quiet(scenario.write_again, folder)
            except Exception:  # noqa: BLE001  # told at the end, with all others
                wrong.append(f"{last}: after {step}: {traceback.format_exc()}")
        if sorted(os.listdir(folder)) != sorted(scenario.names):
            wrong.append(f"{last}: the next write leaves {os.listdir(folder)}")
    if scenario.changes and seen != {False, True}:
        wrong.append("no kill left the old, or none the new")
    return count, wrong


def main(folder, names):
    from kill_scenarios import SCENARIOS

    # What a killed process has written is there with or without a flush, which would take nearly all of the time.
    os.fsync = lambda file: None
    vars(fcntl).pop("F_FULLFSYNC", None)
    found = {name: every_kill(SCENARIOS[name](folder), folder / "killed") for name in names}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

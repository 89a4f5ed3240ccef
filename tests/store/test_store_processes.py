"""Several processes on one folder, some of them killed at any moment: nothing wrong is read, and the bound holds."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from block_texts import disk_bytes

from mlxkv.store.index import BlockStore

TESTS = Path(__file__).parents[1]
LIMIT = 4 * 2**20


def worker(folder, seed, seconds):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, str(TESTS / "store_worker.py"), str(folder), str(seed), str(seconds), str(LIMIT)]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def watched(folder, processes):
    """The most bytes that the folder took while processes ran."""
    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, disk_bytes(folder))
    return most


def test_two_processes_on_one_folder_lose_nothing_and_keep_the_bound(tmp_path):
    processes = [worker(tmp_path, seed, 0.5) for seed in range(2)]
    assert watched(tmp_path, processes) <= LIMIT
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    intact(tmp_path)


def intact(folder):
    with BlockStore(folder) as store:
        assert disk_bytes(folder) <= store.statistics().taken <= LIMIT
        # A process killed while it removed a file leaves a row without one, which is a miss.
        assert {reason for _, reason in store.verify().damaged} <= {"No such file or directory"}
        found = store.sweep()
        assert (found.freed, found.missing) == (0, 0)
        before = store.statistics()
        store.clear()
        assert store.statistics()[1:5] == (0, 0, 0, 0), before


@pytest.mark.slow
def test_processes_killed_at_any_moment_leave_a_store_that_goes_on(tmp_path):
    chance = random.Random(0)
    other = worker(tmp_path, 99, 60)
    for seed in range(8):
        process = worker(tmp_path, seed, 20)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        until = time.monotonic() + chance.uniform(0.01, 0.3)
        while time.monotonic() < until:
            assert disk_bytes(tmp_path) <= LIMIT
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert other.poll() is None, other.communicate()[1]
    _, errors = other.communicate()
    assert other.returncode == 0, errors
    intact(tmp_path)

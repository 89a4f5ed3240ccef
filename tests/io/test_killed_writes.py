"""Every write path, killed after each of its operations on files: readers find the old or the new, and the next write goes through."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
WRITES = ("write", "overwrite", "overwrite-pending", "overwrite-same", "dump", "dump-overwrite", "eval")
APPENDS = ("append", "append-shorter", "append-to-pending", "finish-pending")
FOLDERS = ("artifacts", "artifacts-overwrite", "library-add", "library-remove", "work-keep", "work-remove")
LIVE = ("save-cache", "save-cache-overwrite", "prompt-cache", "prompt-cache-overwrite")
BROKEN = ("in-place", "hasty")
SESSIONS = ("session-turn",)
STORE = ("store-block", "store-first-block", "store-full", "store-more-rows", "store-states", "store-lost-index")
REMOVALS = ("store-quarantine", "store-remove")
COMMANDS = ("compress-command", "append-command", "convert-command", "calibrate-command")


def killed(folder, names, stride=1):
    """Operations and mistakes of each scenario, found by a process of its own, which never uses MLX and so may fork."""
    environment = {
        "KILL_STRIDE": str(stride),  # `make storm` sets it to 1
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / "killing.py"), str(folder), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_a_write_killed_at_any_operation_leaves_the_old_or_the_new_and_the_next_one_goes_through(tmp_path):
    promised(killed(tmp_path, WRITES + APPENDS + FOLDERS + STORE[:1]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="a forked process cannot use Metal")
@pytest.mark.parametrize(
    ("names", "stride"),
    [(LIVE + SESSIONS, 1), (COMMANDS, 3), (STORE + REMOVALS, 2)],
    ids=["live caches and sessions", "commands", "store"],
)
def test_whole_commands_and_live_caches_keep_that_promise(tmp_path, names, stride):
    promised(killed(tmp_path, names, stride))


def promised(scenarios):
    for name, (operations, wrong) in scenarios.items():
        assert operations > 5, name
        assert wrong == [], name


def test_a_write_that_keeps_no_promise_is_found_out(tmp_path):
    for name, (_, wrong) in killed(tmp_path, BROKEN).items():
        assert any("neither the old nor the new" in line or "Error" in line for line in wrong), name

"""Prompts as what is learnt from, what learning from them is worth, and the process that it happens in."""

import os
import subprocess
import sys
import time

import pytest
from conftest import tiny_model, tiny_tokens

from mlxkv.calibration import budget, prompts, training, worth
from mlxkv.calibration.texts import Stretch, Stretches
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.dump import write_dump
from mlxkv.errors import InputError
from mlxkv.sensitivity import dump_with_sensitivity


@pytest.fixture
def dumps(tmp_path):
    """A folder with two finished stretches."""
    model = tiny_model("llama")
    for index in range(2):
        write_dump(tmp_path / f"{index:05d}.npz", dump_with_sensitivity(model, tiny_tokens(200, seed=index)))
    return tmp_path, 2


def test_what_prompts_share_is_taken_once_wherever_it_stands():
    first, second, other = tiny_tokens(300, seed=1), tiny_tokens(200, seed=2), tiny_tokens(100, seed=3)
    found = prompts.distinct([first + second, first, other + first, second + other + first[:90]], 10**6, 97)
    assert found == ([first + second, other], 2, 600)
    twice = prompts.distinct([first + first], 10**6, 97)
    assert twice.tokens == 300
    assert prompts.distinct([first, second, other], 250, 97).prompts == 1
    assert prompts.distinct([first, second, other], 10**6, 97, lambda: True).prompts == 0


def test_prompts_and_other_texts_take_turns_and_what_is_held_out_is_not_learnt_from():
    start, runs = [5], [[5, *tiny_tokens(800, seed=i)] for i in range(8)]
    own = prompts.Distinct(runs, 8, sum(map(len, runs)))
    other = Stretches(
        [Stretch("prose", [5, *tiny_tokens(300, seed=90 + i)]) for i in range(20)], [Stretch("prose", [5] * 20)]
    )
    found = prompts.stretches_of(own, start, 336, 4_000, lambda: other)
    tokens = {kind: sum(len(s.tokens) for s in found.trained if s.kind == kind) for kind in ("own prompts", "prose")}
    assert 2_500 <= tokens["own prompts"] <= 3_000
    assert 700 <= tokens["prose"] <= 4_000 - tokens["own prompts"]
    assert {stretch.kind for stretch in found.trained[:4]} == {"own prompts", "prose"}
    assert all(s.tokens[0] == 5 and s.tokens[1] != 5 and len(s.tokens) <= 336 for s in found.trained)
    assert [s.kind for s in found.held_out] == ["own prompts", "own prompts", "prose"]
    learnt = {tuple(s.tokens[i : i + 16]) for s in found.trained for i in range(len(s.tokens) - 15)}
    held = {tuple(s.tokens[i : i + 16]) for s in found.held_out for i in range(1, len(s.tokens) - 15)}
    assert not learnt & held
    alone = prompts.stretches_of(own, start, 336, 4_000)
    assert sum(len(s.tokens) for s in alone.trained) > 3_500


@pytest.mark.parametrize(
    ("learnt", "free", "why"),
    [
        ((0.005, 20.0), (0.002, 5.0), None),
        ((0.05, 20.0), (0.03, 5.0), None),  # a model that diverges whatever is done
        ((0.03, 20.0), (0.002, 5.0), "diverge by 0.03"),
        ((float("nan"), 20.0), (0.002, 5.0), "diverge by nan"),
        ((0.005, 5.5), (0.002, 5.0), "5.5 times smaller"),
        (None, None, "no text to measure"),
    ],
)
def test_artifacts_are_worth_it_if_files_are_smaller_and_predictions_stay(learnt, free, why):
    rows = [
        [{"kind": "own prompts", "quality": q, "kl": pair[0], "ratio": pair[1]}] if pair else []
        for q, pair in ((38, learnt), (48, free))
    ]
    found = worth.refusal(*rows)
    assert found is None if why is None else why in found


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                            400.
"""


def test_free_memory_is_what_the_system_tells():
    assert budget._free_on_mac(VM_STAT) == 33_400 * 16_384
    assert budget._free_on_mac("no such command") is None
    assert 10**7 < budget.free_memory() < 10**14


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_of_its_own_learns_the_same_and_gives_way_to_others(dumps):
    folder, count = dumps
    with training.Training(folder, count, KVTCRDConfig(), gentle=True) as child:
        while not child.ended() and os.getpriority(os.PRIO_PROCESS, child.pid) != 19:
            time.sleep(0.01)
        found = child.result()
    files = [folder / f"{index:05d}.npz" for index in range(count)]
    assert found.fingerprint == training.train(files, KVTCRDConfig()).fingerprint


def test_why_a_process_failed_is_told(dumps):
    folder, _ = dumps
    with training.Training(folder, 1, KVTCRDConfig()) as child:
        (folder / "00000.npz").write_bytes(b"none")
        steps = list(child.steps())
        with pytest.raises(InputError, match=r"00000\.npz"):
            child.result()
    assert steps == []


def test_a_process_that_learns_ends_with_its_parent_however_that_ends(dumps):
    folder, count = dumps
    code = (
        "import sys, os, signal; from pathlib import Path; from mlxkv.calibration.training import Training\n"
        "from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig\n"
        f"child = Training(Path({str(folder)!r}), {count}, KVTCRDConfig())\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid, until = int(done.stdout), time.monotonic() + 20
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(pid)

"""The work on one model's own prompts: its stretches are chosen once and kept beside what is finished of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mlxkv.calibration.texts import Stretch, Stretches
from mlxkv.calibration.training import LEARNT
from mlxkv.calibration.work import FORMAT, Work, remove_path
from mlxkv.errors import MlxkvError
from mlxkv.io.atomic import atomic_write
from mlxkv.io.inputs import MAX_JSON, parse_json, read_bytes
from mlxkv.sensitivity import STRETCH_TOKENS
from mlxkv.spec import CacheSpec, is_int

_GIVEN_UP_SECONDS = 7 * 24 * 3600  # after which what failed is tried again
_MOST_STRETCHES = 10_000
_MOST_TOKEN = 2**31 - 1


class ModelWork(Work):
    """The unfinished work on a model's own prompts, of which there is one on a machine.

    Parameters
    ----------
    fingerprint
        Fingerprint of the model.
    spec
        Description of its cache.

    Attributes
    ----------
    held_out
        Stretches to measure with.
    given_up
        Why it was given up, less than a week ago; empty where it was not.
    deaths
        How often a process was killed in the middle of a step.

    Raises
    ------
    InputError
        When the folder cannot be made, or another process works in it.
    """

    def __init__(self, fingerprint: str, spec: CacheSpec) -> None:
        digest = blake2b(
            f"{FORMAT} {fingerprint} {json.dumps(spec.to_json(), sort_keys=True)}".encode(), digest_size=16
        )
        super().__init__(fingerprint, spec, [], f"model-{digest.hexdigest()}")
        self.held_out: Sequence[Stretch] = []
        self.given_up, self.deaths = "", 0
        self._read()
        if self._marker.exists():
            self.deaths += 1
            self._write()
            remove_path(self._marker)

    @property
    def _plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def _marker(self) -> Path:
        return self.folder / "running"

    def choose(self, stretches: Stretches) -> None:
        """Begin with these stretches, and forget all others.

        Parameters
        ----------
        stretches
            Those to learn from, and those to measure with.

        Raises
        ------
        InputError
            When they cannot be written.
        """
        self._clear()
        self.stretches, self.held_out, self.given_up = stretches.trained, stretches.held_out, ""
        self._write()

    def give_up(self, reason: str) -> None:
        """Forget all stretches, and remember for a week why.

        Parameters
        ----------
        reason
            In plain words.

        Raises
        ------
        InputError
            When it cannot be written.
        """
        self._clear()
        self.stretches, self.held_out, self.given_up, self.deaths = [], [], reason[:500], 0
        self._write()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Mark that a step is being done: a process that is killed meanwhile leaves the mark.

        Yields
        ------
        None
            While it is marked.
        """
        self._marker.touch()
        try:
            yield
        finally:
            remove_path(self._marker)

    def _clear(self) -> None:
        for path in (*self.folder.glob("*.npz"), self.folder / LEARNT):
            remove_path(path)

    def _write(self) -> None:
        state = {
            "trained": self.stretches,
            "held_out": self.held_out,
            "given_up": self.given_up,
            "at": int(time.time()),
            "deaths": self.deaths,
        }
        with atomic_write(self._plan) as file:
            file.write(json.dumps(state).encode())

    def _read(self) -> None:
        """Read what was chosen, from any source: a plan that is none is no plan."""
        try:
            state = parse_json(read_bytes(self._plan, MAX_JSON), "plan.json")
        except MlxkvError:
            return
        reason, at, deaths = state.get("given_up"), state.get("at"), state.get("deaths")
        if isinstance(reason, str) and isinstance(at, int) and abs(time.time() - at) < _GIVEN_UP_SECONDS:
            self.given_up = reason[:500]
        self.deaths = deaths if isinstance(deaths, int) else 0
        trained, held_out = _stretches(state.get("trained")), _stretches(state.get("held_out"))
        if trained and held_out:
            self.stretches, self.held_out = trained, held_out


def _stretches(found: Any) -> Sequence[Stretch]:
    """Return the stretches of a plan; none where anything about them is wrong."""
    if not isinstance(found, list) or len(found) > _MOST_STRETCHES:
        return []
    stretches = []
    for item in found:
        kind, tokens = item if isinstance(item, list) and len(item) == 2 else (None, None)
        if not isinstance(kind, str) or not isinstance(tokens, list) or not 16 <= len(tokens) <= STRETCH_TOKENS:
            return []
        if not all(is_int(token, 0, _MOST_TOKEN) for token in tokens):
            return []
        stretches.append(Stretch(kind[:80], tokens))
    return stretches

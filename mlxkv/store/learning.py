"""A model's own prompts as what its artifacts are learnt from: a little at a time, while a server has nothing else to do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import Any

import mlx.core as mx

from mlxkv.calibration import gradual
from mlxkv.calibration.gradual import LEAST_TOKENS, MOST_TOKENS, Gradual, Stopped
from mlxkv.calibration.model_work import ModelWork
from mlxkv.codec import library
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.errors import InputError, MlxkvError
from mlxkv.identity import same_model
from mlxkv.spec import CacheSpec
from mlxkv.store.codings import DEFAULT_QUALITY

METHOD = "kvtc-rd"
_MOST_DEATHS, _MOST_FAILURES = 3, 3
_LATER, _MUCH_LATER = 120.0, 600.0  # seconds until it is looked again whether there is anything to do

_log = logging.getLogger(__name__)


class Learning:
    """Artifacts of a model, learnt from prompts that a store holds, in short steps between requests.

    Each step leaves the model as it was, and gives MLX's memory back. What is finished waits on disk: another process goes on
    from there, and of several on one machine one works. Training runs in a process of its own at the lowest priority. What was
    learnt is measured on prompts that it was not learnt from, and used only if it is worth it.

    Parameters
    ----------
    model
        As `lm.load` returns it. All steps are done on the thread that runs it.
    name
        Name that it was loaded by.
    fingerprint
        `lm.fingerprint` of it.
    spec
        Description of its cache.
    prompts
        Returns tokens of stored prompts, the newest first.
    ready
        Called, in a step, with artifacts that are worth using and in the library.
    tokenizer
        The model's; None where no other texts are to fill up what prompts are too few for.
    quality
        Of the store's blocks, at which artifacts are measured; 0 to 100.
    seconds
        Of all steps until training, at most.
    least_tokens, most_tokens
        Tokens of the model's own prompts to begin with, and of all texts to learn from.
    clock
        Returns seconds.
    """

    def __init__(
        self, model: Any, *, name: str, fingerprint: str, spec: CacheSpec, prompts: Callable[[], Iterable[Sequence[int]]],
        ready: Callable[[CalibrationArtifacts], None], tokenizer: Any = None, quality: float = DEFAULT_QUALITY, seconds: float = 600.0,
        least_tokens: int = LEAST_TOKENS, most_tokens: int = MOST_TOKENS, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._facts: dict[str, Any] = {
            "state": "waiting", "reason": "", "tokens": 0, "tokens_wanted": least_tokens, "stretches": 0,
            "stretches_wanted": 0, "seconds": 0.0, "longest_step_seconds": 0.0, "skipped": 0, "artifacts": "",
        }  # fmt: skip
        self._fingerprint, self._spec, self._prompts, self._ready = fingerprint, spec, prompts, ready
        self._gradual = Gradual(
            model, name, fingerprint, spec, tokenizer, quality, seconds, least_tokens, most_tokens, self._facts
        )
        self._clock, self._again, self._failures = clock, float("-inf"), 0
        self._turn = threading.RLock()  # of a step: `close` waits for it
        self._going: Generator[None, None, None] | None = None
        self._closed = False
        self._before = self._newest()  # which whoever makes this has found as well

    def step(self) -> bool:
        """Do a little, on the thread that runs the model.

        Returns
        -------
        bool
            Whether there is more to do now; False for nothing, at least for some time.
        """
        with self._turn:
            if self._closed or self._clock() < self._again:
                return False
            start = time.perf_counter()
            going = self._going or self._go()
            self._going = None  # unless it gets to its next step: what is interrupted is done again
            try:
                next(going)
                self._going = going
            except StopIteration:
                self._rest("learnt", "", _MUCH_LATER)
            except Stopped as end:
                wait = _MUCH_LATER * max(1, self._facts["skipped"]) if end.reason else _LATER
                self._rest("given up" if end.lasting else "waiting", end.reason, wait)
            except Exception as error:  # noqa: BLE001  # a server goes on, whatever is wrong here
                self._failed(error)
            finally:
                took = time.perf_counter() - start
                self._count(took)
                mx.clear_cache()
            if took > 2 * gradual.STEP_SECONDS and self._going is not None:  # the machine is busy with something else
                self._again = self._clock() + _LATER
            return self._going is not None and self._clock() >= self._again

    def statistics(self) -> dict[str, Any]:
        """Return how far it is; any thread may ask.

        Returns
        -------
        dict
            `state`, one of "waiting" (for prompts, memory, disk or another process), "running" (texts), "training",
            "measuring", "learnt" and "given up"; `reason` in plain words; `tokens` and `stretches` that were run, of
            `tokens_wanted` and `stretches_wanted`; `seconds` of all steps and `longest_step_seconds`; `skipped`, how often there
            was too little memory, disk or speed; `artifacts`, the fingerprint of those that are used.
        """
        return dict(self._facts)

    def close(self) -> None:
        """End for good, after the step that is being done, and training with it. What is finished waits for another process."""
        self._closed = True
        with self._turn, suppress(ValueError):  # it is this thread that is in the middle of a step
            if self._going is not None:
                self._going.close()
                self._going = None

    def _go(self) -> Generator[None, None, None]:
        """Go through everything; what is between two yields is a step."""
        if self._is_there():
            return
        try:
            work = ModelWork(self._fingerprint, self._spec)
        except InputError as error:
            raise Stopped(error.message) from error
        try:
            if work.given_up:
                raise Stopped(work.given_up, lasting=True)
            if work.deaths >= _MOST_DEATHS:
                raise Stopped(f"the server was killed {work.deaths} times in the middle of it", lasting=True)
            yield from self._gradual.choose(work, self._prompts)
            count = yield from self._gradual.run(work)
            artifacts = yield from self._gradual.train(work, count)
            self._use(work, (yield from self._gradual.judge(work, artifacts)))
        except Stopped as end:
            if end.lasting and not work.given_up:
                work.give_up(end.reason)
            raise
        finally:
            work.close()

    def _use(self, work: ModelWork, artifacts: CalibrationArtifacts) -> None:
        """Add artifacts to the library, unless others have come meanwhile, and hand them on."""
        if not self._is_there():
            library.add(artifacts)
            self._is_there()
        work.remove()

    def _is_there(self) -> bool:
        """Return whether the library has artifacts of this model, and hand on those that have come since the last time."""
        newest = self._newest()
        if newest and newest != self._facts["artifacts"]:
            found = library.find(self._fingerprint, METHOD, self._spec)
            newest = found.fingerprint if found else ""
            if found and newest != self._before:
                self._ready(found)
        self._before = self._facts["artifacts"] = newest
        return bool(newest)

    def _newest(self) -> str:
        """Return the fingerprint of the newest artifacts of this model; empty for none."""
        for item in library.items():
            if item.method == METHOD and not item.problem and same_model(item.model_fingerprint, self._fingerprint):
                return item.fingerprint
        return ""

    def _count(self, took: float) -> None:
        self._gradual.spent += took
        longest = max(self._facts["longest_step_seconds"], round(took, 3))
        self._facts |= {"seconds": round(self._gradual.spent, 2), "longest_step_seconds": longest}

    def _failed(self, error: Exception) -> None:
        """Note a failure; after some of them, give up for as long as this process lives."""
        self._failures += 1
        told = error.message if isinstance(error, MlxkvError) else f"{type(error).__name__}: {error}"
        _log.warning("learning from prompts failed: %s", told)
        self._closed = self._failures >= _MOST_FAILURES
        self._rest("given up" if self._closed else "waiting", told[:500], _MUCH_LATER)

    def _rest(self, state: str, reason: str, seconds: float) -> None:
        """Note that there is nothing to do for some time, and say why if it is news."""
        self._again = self._clock() + seconds
        if reason and reason != self._facts["reason"]:
            _log.info("learning from prompts: %s", reason)
        self._facts |= {"state": state, "reason": reason}

"""One go from a model and texts to artifacts: stretches are run as long as time allows, then training, then what it is worth."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlxkv import lm
from mlxkv.calibration import budget as sizes
from mlxkv.calibration import training, worth
from mlxkv.calibration.budget import Budget, Plan
from mlxkv.calibration.costs import FEWEST_STRETCHES, MOST_STRETCHES, SECONDS, Costs
from mlxkv.calibration.texts import Stretch, Stretches
from mlxkv.calibration.training import Training
from mlxkv.calibration.work import Work
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import method_to_calibrate
from mlxkv.codec.methods.base import CodecConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, read_dump
from mlxkv.errors import InputError, UnsupportedError
from mlxkv.models import cache_spec
from mlxkv.sensitivity import dump_with_sensitivity

DEFAULT_SECONDS = 180.0
_FEWEST_MEASURED = 2  # held-out texts, whatever the budget
_PROBED = 2  # stretches after which the speed is known; the first one is slower than those that follow


@dataclass(frozen=True)
class Reports:
    """Functions that are told how a calibration goes on.

    Parameters
    ----------
    progress
        Called with what is being done and the share of all work that is done, 0 to 1.
    plan
        Called with a `Plan`: of all that may be run, then, when the speed is known, of what will be.
    """

    progress: Callable[[str, float], None] = lambda what, share: None
    plan: Callable[[Plan], None] = lambda plan: None


def run_stretch(
    model: Any, stretch: Stretch, *, seed: int, name: str, fingerprint: str, cache: Sequence[Any] | None = None
) -> KVDump:
    """Run a stretch through a model; the cache is kept in float16 where its values fit.

    Parameters
    ----------
    model
        As `lm.load` returns it.
    stretch
        Its tokens, at most 672.
    seed
        Seed of the labels that the model draws.
    name, fingerprint
        Of the model, for the dump.
    cache
        As for `dump_with_sensitivity`.

    Returns
    -------
    KVDump
        The cache, with its sensitivity.

    Raises
    ------
    InputError
        For fewer than 16 tokens or too many.
    UnsupportedError
        For a model that `cache_spec` refuses.
    """

    def run(dtype: str) -> KVDump:
        return dump_with_sensitivity(
            model, stretch.tokens, seed=seed, name=name, fingerprint=fingerprint, dtype=dtype, cache=cache
        )

    try:
        return run("float16")
    except InputError:  # values beyond float16's
        return run("float32")


class Calibration:
    """A calibration of one model on texts.

    Parameters
    ----------
    model
        As `lm.load` returns it.
    name
        Name that it was loaded by.
    texts
        What `cut` returned.
    config
        Settings of a codec method.
    seconds
        Time for everything since `started`; at least about 4,096 tokens are run in any case.
    clock
        Returns seconds.
    started
        When it began, by that clock; None for now.
    reports
        Functions that are told how it goes on.

    Raises
    ------
    InputError
        For no time at all, for a method that needs no calibration, and when another process calibrates this model on these texts.
    UnsupportedError
        For a model that `cache_spec` refuses.
    """

    def __init__(
        self, model: Any, name: str, texts: Stretches, config: CodecConfig, *, seconds: float = DEFAULT_SECONDS,
        clock: Callable[[], float] = time.monotonic, started: float | None = None, reports: Reports | None = None,
    ) -> None:  # fmt: skip
        if not 0 < seconds < float("inf"):
            raise InputError(f"a budget is a number of minutes above 0, not {seconds / 60}")
        method_to_calibrate(config)
        self.model, self.name, self.config = model, name, config
        self.reports = reports or Reports()
        self.budget = Budget(seconds, clock, clock() if started is None else started)
        self.fingerprint, self.spec = lm.fingerprint(model), cache_spec(model)
        self.held_out = texts.held_out
        most = sizes.most_stretches(self.spec, [len(stretch.tokens) for stretch in texts.trained])
        self.stretches = texts.trained[:most]
        self.work = Work(self.fingerprint, self.spec, self.stretches)
        self.resumed = 0
        mx.reset_peak_memory()
        self._model_bytes = mx.get_active_memory()
        self._flops = sizes.machine_flops()
        self._seconds: list[float] = []

    def run(self) -> CalibrationArtifacts:
        """Run the texts, learn, and measure; remove the finished stretches when nothing can go wrong any more.

        Returns
        -------
        CalibrationArtifacts
            The artifacts; their `meta` has `measured`, the rows of `worth.table`, and `measured_texts`.

        Raises
        ------
        InputError
            When finished stretches cannot be written, and for a method that cannot learn from so few tokens.
        """
        try:
            count = self._collect()
            artifacts = self._learn(count)
            artifacts = self._cost(artifacts, count)
            artifacts = self._measure(artifacts, count)
        finally:
            self.work.close()
        return artifacts

    def finish(self) -> None:
        """Remove the finished stretches, once the artifacts are saved."""
        self.work.remove()

    def _collect(self) -> int:
        """Run stretches until time is up; return the number of finished ones."""
        self.reports.plan(self._plan(len(self.stretches)))
        done = self.work.finished()
        self.resumed = len(done)
        count = 0
        for index, stretch in enumerate(self.stretches):
            if index not in done:
                if self._is_enough(index):
                    break
                start = self.budget.clock()
                self.work.keep(index, self._dump(stretch, index))
                self._seconds.append(self.budget.clock() - start)
                mx.clear_cache()  # what MLX keeps of the gradients for later
                if len(self._seconds) == _PROBED:
                    self.reports.plan(self._plan(self._expected(index + 1)))
            count = index + 1
            self._show(f"running texts: {stretch.kind}", self._ahead(count))
        return count

    def _dump(self, stretch: Stretch, index: int) -> KVDump:
        """Run a stretch."""
        seed = self.config.seed + index
        return run_stretch(self.model, stretch, seed=seed, name=self.name, fingerprint=self.fingerprint)

    @property
    def _pace(self) -> float:
        """Seconds of a stretch, by those that were run last."""
        return float(np.median(self._seconds[-5:])) if self._seconds else 0.0

    def _tokens(self, count: int) -> int:
        return sum(len(stretch.tokens) for stretch in self.stretches[:count])

    def _rest(self, count: int) -> float:
        """Estimate the seconds after so many stretches are finished."""
        training = sizes.training_seconds(self.spec, self._tokens(count), self._flops)
        return training + self._costing(count) + self._measuring(len(self.held_out))

    def _costing(self, count: int) -> float:
        return SECONDS * self._pace * min(count, MOST_STRETCHES)

    def _measuring(self, texts: int) -> float:
        return sizes.measuring_seconds(texts, len(worth.AROUND), self._pace)

    def _is_enough(self, count: int) -> bool:
        """Return whether another stretch after so many would take too long."""
        if self._tokens(count) < sizes.USEFUL_TOKENS or len(self._seconds) < min(_PROBED, len(self.stretches)):
            return False
        return not self.budget.allows(self._pace + self._rest(count + 1))

    def _expected(self, count: int) -> int:
        """Return how many stretches time will allow, when so many are finished."""
        spare = self.budget.seconds - self.budget.elapsed
        while count < len(self.stretches):
            more = self._tokens(count) < sizes.USEFUL_TOKENS
            spare -= self._pace
            if not more and spare < self._rest(count + 1):
                break
            count += 1
        return count

    def _plan(self, count: int) -> Plan:
        tokens, lengths = self._tokens(count), [len(stretch.tokens) for stretch in self.stretches[:count]]
        memory = max(sizes.memory_bytes(self.spec, tokens), mx.get_peak_memory() - self._model_bytes)
        ahead = max(0, count - len(self._seconds) - self.resumed) * self._pace + self._rest(count)
        seconds = self.budget.elapsed + ahead if self._seconds else 0.0
        return Plan(count, tokens, seconds, memory, sizes.disk_bytes(self.spec, lengths))

    def _ahead(self, done: int) -> float:
        """Estimate the seconds that are left when so many stretches are finished."""
        if len(self._seconds) < _PROBED:
            return max(0.0, self.budget.seconds - self.budget.elapsed)
        count = self._expected(done)
        return (count - done) * self._pace + self._rest(count)

    def _show(self, what: str, ahead: float) -> None:
        """Report what is being done, and the share of the time that is over."""
        self.reports.progress(what, self.budget.elapsed / max(self.budget.elapsed + ahead, 1e-9))

    def _learn(self, count: int) -> CalibrationArtifacts:
        """Learn from so many finished stretches."""
        start, after = self.budget.clock(), self._costing(count) + self._measuring(len(self.held_out))
        expected = sizes.training_seconds(self.spec, self._tokens(count), self._flops)

        def show(step: str) -> None:
            spent = self.budget.clock() - start
            self._show(
                f"learning: {step.partition(' of 0')[0].partition(':')[0]}",
                max(expected - spent, 0.1 * expected) + after,
            )

        if not training.has_own_process(self.config):
            return training.train([self.work.path(index) for index in range(count)], self.config, show)
        with Training(self.work.folder, count, self.config) as learning:  # Ctrl-C ends it at once
            for step in learning.steps():
                show(step)
            return learning.result()

    def _cost(self, artifacts: CalibrationArtifacts, count: int) -> CalibrationArtifacts:
        """Measure what errors of each layer cost a live cache, and note it; of as many stretches as time allows."""
        costs, after = Costs(self.spec), self._measuring(_FEWEST_MEASURED)
        count, pace = min(count, MOST_STRETCHES), 0.0
        for index in range(count):
            if index >= FEWEST_STRETCHES and not self.budget.allows(pace + after):
                break
            ahead = (count - index) * (pace or SECONDS * self._pace) + self._measuring(len(self.held_out))
            self._show("learning: costs of errors by layer", ahead)
            start = self.budget.clock()
            try:
                costs.measure(self.model, read_dump(self.work.path(index)))
            except UnsupportedError:  # live caches do not work with every model
                break
            pace = self.budget.clock() - start
            mx.clear_cache()
        return replace(artifacts, meta={**artifacts.meta, **costs.facts()})

    def _measure(self, artifacts: CalibrationArtifacts, count: int) -> CalibrationArtifacts:
        """Measure on held-out texts as long as time allows, and note what was found."""
        codec, wanted = CacheCodec(artifacts), worth.qualities(artifacts)
        records: list[dict[str, Any]] = []
        pace, measured = 0.0, 0
        for number, text in enumerate(self.held_out):
            if number >= _FEWEST_MEASURED and not self.budget.allows(pace):
                break
            self._show(f"measuring: {text.kind}", (len(self.held_out) - number) * (pace or self._measuring(1)))
            start = self.budget.clock()
            records += worth.measure(self.model, codec, text, wanted, self.fingerprint)
            pace, measured = self.budget.clock() - start, number + 1
        rows = worth.table(records)
        meta = {
            **artifacts.meta,
            "measured": rows,
            "measured_texts": measured,
            "calibration_kinds": sorted({stretch.kind for stretch in self.stretches[:count]}),
            "calibration_seconds": round(self.budget.elapsed, 1),
        }
        found = replace(artifacts, meta=meta)
        told = worth.warning(found, rows)
        return replace(found, meta={**meta, "warning": told}) if told else found

"""A calibration in short steps, between which whoever runs the model can do other work with it.

Each function here is a generator: what it does between two yields is one step. A step leaves the model as it was.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlxkv import lm
from mlxkv.calibration import budget, worth
from mlxkv.calibration.costs import MOST_STRETCHES, Costs
from mlxkv.calibration.model_work import ModelWork
from mlxkv.calibration.prompts import OWN, Distinct, distinct, stretches_of
from mlxkv.calibration.run import run_stretch
from mlxkv.calibration.texts import Stretch, Stretches, cut, default_texts
from mlxkv.calibration.training import LEARNT, Training
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import uncalibrated
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump, read_dump
from mlxkv.errors import InputError, MlxkvError, UnsupportedError
from mlxkv.sensitivity import context_length
from mlxkv.spec import CacheSpec

LEAST_TOKENS, LEAST_PROMPTS = 6_000, 3  # of the model's own, which are in no other prompt
MOST_TOKENS = 24_000  # to learn from
SIZES = (168, 336, 672)  # tokens of a stretch: the longest whose steps are short enough
STEP_SECONDS = 2.0  # of a step, about
TRAINING_SECONDS = 3_600.0
_CHUNK_TOKENS = 256  # of a context that a step reads
_MOST_DISK, _SHARE = 8 * 10**9, 0.5  # bytes; of the memory and disk that are free
_LEAST_MEMORY = 10**9  # free, before anything is tried
_PROCESS_BYTES = 500 * 10**6  # of the process that learns, beside what it learns from
_SCAN_SECONDS = 1.0  # for reading prompts
_POLL_SECONDS = 0.05  # that a step waits while another process learns
_RECENT = 32  # newest tokens of a measured text: a store computes them again
_DIRECT_BONUS, _MOST_DIRECT = 10.0, 70.0  # the quality of a store's blocks that need no calibration
_CONFIG = KVTCRDConfig()
_NO_MORE: dict[str, Any] = {}
Steps = Generator[None, None, None]


class Stopped(Exception):  # noqa: N818  # no error: an end of the work, for now or for a week
    """There is nothing to do for some time.

    Attributes
    ----------
    reason
        In plain words; empty where there is nothing to say.
    lasting
        Whether it is to be given up.
    """

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.lasting = reason, lasting


@dataclass
class Gradual:
    """A calibration of a model on its own prompts, step by step.

    Parameters
    ----------
    model, name, fingerprint, spec
        The model, the name that it was loaded by, `lm.fingerprint` of it and the description of its cache.
    tokenizer
        The model's; None where no other texts are to fill up what prompts are too few for.
    quality
        At which artifacts are measured, 0 to 100.
    seconds
        Of all steps until training, at most.
    least_tokens, most_tokens
        Tokens of prompts to begin with, and of all texts to learn from.
    spent
        Seconds of all steps until now: whoever calls them counts.
    facts
        How far it is: `state`, `tokens`, `tokens_wanted`, `stretches`, `stretches_wanted`, `skipped`.
    """

    model: Any
    name: str
    fingerprint: str
    spec: CacheSpec
    tokenizer: Any
    quality: float
    seconds: float
    least_tokens: int
    most_tokens: int
    facts: dict[str, Any]
    spent: float = 0.0

    def choose(self, work: ModelWork, prompts: Callable[[], Iterable[Sequence[int]]]) -> Steps:
        """Choose what to learn from, unless that was done.

        Parameters
        ----------
        work
            Where the choice is kept.
        prompts
            Returns tokens of stored prompts, the newest first.

        Yields
        ------
        None
            After each step.

        Raises
        ------
        Stopped
            Where there are too few prompts, there is no room, or steps take too long.
        """
        vocabulary = int(lm.prefill(self.model, [0], make_prompt_cache(self.model)).shape[-1])
        chosen = (token for stretch in (*work.stretches, *work.held_out) for token in stretch.tokens)
        if max(chosen, default=vocabulary) < vocabulary:
            return
        until = time.perf_counter() + _SCAN_SECONDS
        own = distinct(prompts(), 2 * self.most_tokens, vocabulary, lambda: time.perf_counter() > until)
        self.facts |= {"tokens": own.tokens, "tokens_wanted": self.least_tokens}
        if own.tokens < self.least_tokens or own.prompts < LEAST_PROMPTS:
            raise Stopped("")
        yield
        start = lm.text_start(self.tokenizer) if self.tokenizer else []
        size, memory = yield from self._probe(work, own, start)
        stretches = stretches_of(own, start, size, self.most_tokens, self._filler(size))
        yield
        trained = stretches.trained[: self._room(work, stretches.trained, memory)]
        work.choose(Stretches(trained, stretches.held_out))
        yield

    def _filler(self, size: int) -> Callable[[], Stretches] | None:
        return (lambda: cut(self.tokenizer, default_texts(), size)) if self.tokenizer else None

    def _probe(self, work: ModelWork, own: Distinct, start: Sequence[int]) -> Generator[None, None, tuple[int, int]]:
        """Return how many tokens a stretch may have, and the memory that its gradients take."""
        free = _free_memory()
        if free < _LEAST_MEMORY:
            self._skip(f"only {free / 1e9:.1f} GB of memory are free")
        text = [*start, *(token for run in own.runs for token in run)]
        size = memory = 0
        for tokens in (SIZES[0], *SIZES):  # the first time is slower than those that follow
            stretch = Stretch(OWN, text[:tokens])
            cache = yield from self._prefilled(work, stretch)
            mx.reset_peak_memory()
            active, begun = mx.get_active_memory(), time.perf_counter()
            self._gradients(work, stretch, 0, cache)
            took, needed = time.perf_counter() - begun, mx.get_peak_memory() - active
            yield
            if size and took > STEP_SECONDS:
                break
            size, memory, first = tokens, needed, took
            if 2 * needed > _SHARE * free or 2 * took > 1.5 * STEP_SECONDS:
                break
        if size == SIZES[0] and first > 2 * STEP_SECONDS:
            self._skip(f"a step takes {first:.0f} seconds now, for which requests would have to wait")
        return size, memory

    def _room(self, work: ModelWork, stretches: Sequence[Stretch], memory: int) -> int:
        """Return how many stretches there is memory and disk for."""
        lengths = [len(stretch.tokens) for stretch in stretches]
        memory_room = _SHARE * _free_memory()
        disk_room = min(_MOST_DISK, _SHARE * shutil.disk_usage(work.folder).free)

        def needs(count: int) -> tuple[int, int]:
            return max(memory, self._memory(lengths[:count])), budget.disk_bytes(self.spec, lengths[:count])

        most = min(len(lengths), budget.most_stretches(self.spec, lengths))
        useful = min(most, 1 + sum(end < budget.USEFUL_TOKENS for end in itertools.accumulate(lengths)))
        for count in range(most, useful - 1, -1):
            if needs(count)[0] <= memory_room and needs(count)[1] <= disk_room:
                return count
        memory, disk = needs(useful)
        self._skip(
            f"{memory / 1e9:.1f} GB of memory and {disk / 1e9:.1f} GB of disk are needed, more than half of what is free"
        )

    def _memory(self, lengths: Sequence[int]) -> int:
        """Estimate the memory of the process that learns."""
        return _PROCESS_BYTES + budget.memory_bytes(self.spec, sum(lengths))

    def _skip(self, reason: str) -> NoReturn:
        self.facts["skipped"] += 1
        raise Stopped(reason)

    def _prefilled(self, work: ModelWork, stretch: Stretch) -> Generator[None, None, list[Any]]:
        """Return a prompt cache of the context of a stretch, after as many steps as it takes."""
        cache: list[Any] = make_prompt_cache(self.model)
        context = stretch.tokens[: context_length(len(stretch.tokens))]
        for start in range(0, len(context), _CHUNK_TOKENS):
            with work.step():
                lm.prefill(self.model, context[start : start + _CHUNK_TOKENS], cache)
            yield
        return cache

    def _gradients(self, work: ModelWork, stretch: Stretch, index: int, cache: Sequence[Any]) -> KVDump:
        with work.step():
            return run_stretch(
                self.model, stretch, seed=_CONFIG.seed + index, name=self.name, fingerprint=self.fingerprint, cache=cache
            )  # fmt: skip

    def run(self, work: ModelWork) -> Generator[None, None, int]:
        """Run the stretches that are not finished, as long as there is time; return how many are.

        Parameters
        ----------
        work
            Where they are kept.

        Yields
        ------
        None
            After each step.

        Raises
        ------
        Stopped
            When time is over and there are too few tokens to learn from.
        """
        self.facts |= {"state": "running", "stretches": 0, "stretches_wanted": len(work.stretches)}
        tokens, wanted = 0, sum(len(stretch.tokens) for stretch in work.stretches)
        self.facts |= {"tokens": 0, "tokens_wanted": wanted}
        for index, stretch in enumerate(work.stretches):
            if not work.is_finished(index):
                if self.spent > self.seconds:
                    if tokens < min(budget.USEFUL_TOKENS, wanted):
                        raise Stopped(f"{tokens:,} tokens took {self.spent:.0f} seconds: too slow here", lasting=True)
                    return index
                cache = yield from self._prefilled(work, stretch)
                work.keep(index, self._gradients(work, stretch, index, cache))
                del cache
            tokens += len(stretch.tokens)
            self.facts |= {"stretches": index + 1, "tokens": tokens}
            yield
        return len(work.stretches)

    def train(self, work: ModelWork, count: int) -> Generator[None, None, CalibrationArtifacts]:
        """Learn from finished stretches in a process of its own, and return the artifacts.

        Parameters
        ----------
        work
            Where they are kept.
        count
            How many of them.

        Yields
        ------
        None
            Twenty times a second, until the process has ended.

        Raises
        ------
        Stopped
            When it fails, takes more than an hour, or there is too little memory.
        """
        self.facts["state"] = "training"
        if (found := self._learnt_before(work)) is not None:
            return found
        needed, free = self._memory([len(stretch.tokens) for stretch in work.stretches[:count]]), _free_memory()
        if needed > free:
            self._skip(f"learning takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free")
        until = time.monotonic() + TRAINING_SECONDS
        with Training(work.folder, count, _CONFIG, gentle=True) as training:
            while not training.ended():
                if time.monotonic() > until:
                    raise Stopped(f"learning took more than {TRAINING_SECONDS / 60:.0f} minutes", lasting=True)
                time.sleep(_POLL_SECONDS)
                yield
            try:
                return training.result()
            except InputError as error:
                raise Stopped(error.message, lasting=True) from error

    def _learnt_before(self, work: ModelWork) -> CalibrationArtifacts | None:
        """Return the artifacts that an earlier process has learnt and not measured."""
        try:
            found = CalibrationArtifacts.from_dir(work.folder / LEARNT)
            found.check_model(self.spec, self.fingerprint)
        except MlxkvError:
            return None
        return found

    def judge(self, work: ModelWork, artifacts: CalibrationArtifacts) -> Generator[None, None, CalibrationArtifacts]:
        """Measure artifacts on stretches that were held out, and return them.

        Parameters
        ----------
        work
            With the stretches.
        artifacts
            What was learnt.

        Yields
        ------
        None
            After each step.

        Raises
        ------
        Stopped
            Where they are not worth it.
        """
        self.facts["state"] = "measuring"
        free = uncalibrated(self.spec, model=self.name, fingerprint=self.fingerprint)
        direct = CacheCodec(free, _RECENT, quality=min(_MOST_DIRECT, self.quality + _DIRECT_BONUS))
        codecs = [CacheCodec(artifacts, _RECENT, quality=self.quality), direct]
        records: list[dict[str, Any]] = []
        for text in work.held_out:
            measuring = worth.measuring(self.model, codecs, text, self.fingerprint)
            while True:
                with work.step():
                    record = next(measuring, _NO_MORE)
                if record is _NO_MORE:
                    break
                records += [record] if record else []
                yield
        learnt, other = records[::2], records[1::2]
        if told := worth.refusal(learnt, other):
            raise Stopped(told, lasting=True)
        meta = {
            "learnt_from": OWN,
            "measured": worth.table(learnt),
            "measured_texts": len(learnt),
            "measured_uncalibrated": worth.table(other),
            "calibration_kinds": sorted({stretch.kind for stretch in work.stretches}),
            "calibration_seconds": round(self.spent, 1),
        }
        return replace(artifacts, meta={**artifacts.meta, **meta, **(yield from self._costs(work))})

    def _costs(self, work: ModelWork) -> Generator[None, None, Mapping[str, Any]]:
        """Return what errors of each layer cost a live cache, a stretch a step; nothing for a model without live caches."""
        costs = Costs(self.spec)
        for index in range(min(len(work.stretches), MOST_STRETCHES)):
            if not work.is_finished(index):
                break
            try:
                with work.step():
                    costs.measure(self.model, read_dump(work.path(index)))
            except UnsupportedError:
                break
            yield
        return costs.facts()


def _free_memory() -> int:
    """Return the bytes that are free; on a Mac of those that its GPU may use. A quarter of all where the system does not tell."""
    free = budget.free_memory()
    if free is None:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    if mx.metal.is_available():
        free = min(free, int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory())
    return max(0, free)

"""What is asked of each model: its cache dumped and restored, live caches, their files, the codec, and its plan."""

import copy
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, QuantizedKVCache, make_prompt_cache

from mlxkv import CacheCodec, calibrate, load_cache, make_cache, read_dump, save_cache, stock, write_dump
from mlxkv.codec.methods.kvtc import KVTCConfig
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.errors import MlxkvError, UnsupportedError
from mlxkv.identity import fingerprint
from mlxkv.live import live_config
from mlxkv.live.arrays import iter_arrays
from mlxkv.live.base import LayerCache, cache_class_of
from mlxkv.lm import extract_cache, restore
from mlxkv.models import cache_spec
from mlxkv.planning.building import build_model
from mlxkv.planning.caches import TracedModel
from mlxkv.sensitivity import sensitivity
from zoo.build import configuration, tokens

# Live caches pack blocks of 64 tokens: this many have three.
PROMPT, AFTER = 200, 8
LEARNT = 300  # tokens that a codec is calibrated on
# Nats from the whole cache, at most. A random model is far more sensitive than a trained one: a router may take another
# expert. An indexer that takes other tokens changes more.
NEAR = {"int8": 0.03, "int4": 0.3, "smartkv": 0.3}
NEAR_WHERE_TOKENS_ARE_CHOSEN = {"int8": 0.2, "int4": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "int8": {},
    "int4": {},
    "kivi": {"recent": 16},
    "h2o": {"heavy": 16, "recent": 32},
    "smartkv": {},
}


class Outcome(NamedTuple):
    """What came of a check: "ok", "refused" by mlxkv with its reason, or "wrong"."""

    state: str
    note: str


class WrongError(Exception):
    """Something came out other than it should."""


Check = Callable[[str, Any], str]


def outcome(check: Check, name: str, model: Any) -> Outcome:
    """Run one check: its note, mlxkv's reason to refuse, or what went wrong."""
    try:
        return Outcome("ok", check(name, model))
    except MlxkvError as error:
        return Outcome("refused", str(error).splitlines()[0])
    except WrongError as error:
        return Outcome("wrong", str(error))
    except Exception as error:  # noqa: BLE001  # whatever it is, it belongs in the table
        return Outcome("wrong", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def run(model: Any, cache: list, text: list[int], *, chunked: bool = True) -> np.ndarray:
    """Logits `[len(text), vocabulary]` of tokens that follow what the cache holds, in one chunk or one by one."""
    parts = [text] if chunked else [[token] for token in text]
    logits = []
    for part in parts:
        logits.append(model(mx.array([part]), cache=cache)[0].astype(mx.float32))
        mx.eval(logits[-1])
    return np.concatenate([np.array(part) for part in logits])


def gap(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest logit; 0 for identical bits."""
    if np.array_equal(found, expected):
        return 0.0
    used = np.isfinite(expected)  # some models never predict some tokens
    if not np.isfinite(found[used]).all():
        return float("inf")
    return float(np.abs(found[used] - expected[used]).max() / np.abs(expected[used]).max())


def divergence(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of predictions in nats."""
    logs = [x - x.max(-1, keepdims=True) for x in (expected.astype(np.float64), found.astype(np.float64))]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs)
    used = np.isfinite(p)
    if not np.isfinite(found[used]).all():
        return float("inf")
    terms = np.exp(p[used]) * (p[used] - q[used])
    return float(terms.sum() / len(p))


def dumped_and_restored(name: str, model: Any) -> str:
    """A cache leaves the model, is written, read and restored, and the text goes on: a chunk, and one by one."""
    text, spec, worst = tokens(name, 40), cache_spec(model), 0.0
    for length, chunked in ((5, True), (37, True), (37, False)):
        cache = make_prompt_cache(model)
        run(model, cache, text[:length], chunked=chunked)
        dump = extract_cache(cache, spec, [text[:length]], fingerprint=fingerprint(model))
        with tempfile.TemporaryDirectory() as folder:
            write_dump(Path(folder, "cache.npz"), dump)
            dump = read_dump(Path(folder, "cache.npz"))
        for next_chunked in (True, False):
            expected = run(model, copy.deepcopy(cache), text[length : length + 3], chunked=next_chunked)
            found = run(model, restore(model, dump), text[length : length + 3], chunked=next_chunked)
            worst = max(worst, gap(found, expected))
    if worst:
        raise WrongError(f"logits differ by {worst:.1e} of the largest")
    return "identical"


def shared(function: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Remember what several checks need of the model asked of last."""
    last: tuple[Any, ...] = (None, None)

    def remembered(name: str, model: Any) -> Any:
        nonlocal last
        if last[0] is not model or last[1] != name:
            last = model, name, function(name, model)
        return last[2]

    return remembered


@shared
def _own(name: str, model: Any) -> np.ndarray:
    """Logits with mlx-lm's own cache."""
    return _lived(name, model, make_prompt_cache(model))


def live_full(name: str, model: Any) -> str:
    """The live cache that keeps everything predicts exactly what mlx-lm's own cache does."""
    expected, found = _own(name, model), _lived(name, model, make_cache(model, "full"))
    if worst := gap(found, expected):
        raise WrongError(f"full differs from mlx-lm's cache by {worst:.1e} of the largest logit")
    return "identical"


def _lived(name: str, model: Any, cache: list) -> np.ndarray:
    """Logits after a prompt in two chunks: some tokens one by one, and a chunk."""
    text = tokens(name, PROMPT + 2 * AFTER)
    for part in (text[:150], text[150:PROMPT]):
        run(model, cache, part)
    singles = run(model, cache, text[PROMPT : PROMPT + AFTER], chunked=False)
    return np.concatenate([singles, run(model, cache, text[PROMPT + AFTER :])])


def live_methods(name: str, model: Any) -> str:
    """Every method gives finite logits or refuses with a reason, and those with many bits are near."""
    expected = _own(name, model)
    chosen = any(layer is not None and layer.selects for layer in cache_spec(model).layers)
    near = NEAR_WHERE_TOKENS_ARE_CHOSEN if chosen else NEAR
    refusals: dict[str, list[str]] = {}
    for method, settings in METHODS.items():
        try:
            found = _lived(name, model, make_cache(model, method, **settings))
        except MlxkvError as error:
            refusals.setdefault(_reason(error, method), []).append(method)
            continue
        apart = divergence(found, expected)
        if not apart <= near.get(method, 1e9):
            raise WrongError(f"predictions with {method} are {apart:.3g} nats apart")
    return "; ".join(f"no {', '.join(methods)}: {reason}" for reason, methods in refusals.items())


def _reason(error: MlxkvError, method: str) -> str:
    """The cause of a refusal, without names that the table has anyway and without its consequence."""
    text = re.sub(r" of this \S+ model", "", str(error).splitlines()[0])
    return text.removeprefix(f"{method} ").partition(", so every ")[0]


def live_files(name: str, model: Any) -> str:
    """A live cache that is saved and loaded goes on exactly as the one that was not."""
    text = tokens(name, PROMPT + 2 * AFTER)
    cache = make_cache(model, "int8")
    run(model, cache, text[:PROMPT])
    with tempfile.TemporaryDirectory() as folder:
        save_cache(Path(folder, "cache"), model, cache)
        loaded = load_cache(Path(folder, "cache"), model)
    for chunked, part in ((True, text[PROMPT : PROMPT + AFTER]), (False, text[PROMPT + AFTER :])):
        if worst := gap(run(model, loaded, part, chunked=chunked), run(model, cache, part, chunked=chunked)):
            raise WrongError(f"a loaded cache differs by {worst:.1e} of the largest logit")
    return "identical"


@shared
def _texts(name: str, model: Any) -> tuple[list[int], Any, Any, np.ndarray]:
    """A text with its dump, the dump of another, and logits of what follows that."""
    spec, text = cache_spec(model), tokens(name, LEARNT + 140, seed=2)
    dumps = []
    for part in (text[:LEARNT], text[LEARNT:]):
        cache = make_prompt_cache(model)
        run(model, cache, part)
        dumps.append(extract_cache(cache, spec, [part], fingerprint=fingerprint(model)))
    return text[:LEARNT], *dumps, run(model, cache, tokens(name, 3, seed=3))


def _coded(name: str, model: Any, config: Any, *, measured: bool) -> str:
    """A dump compressed and decompressed restores, and predictions from it are finite."""
    text, learnt, held, expected = _texts(name, model)
    if measured:
        learnt = replace(learnt, sensitivity=sensitivity(model, text))
    with tempfile.TemporaryDirectory() as folder:
        write_dump(Path(folder, "learnt.npz"), learnt)
        codec = CacheCodec(calibrate([Path(folder, "learnt.npz")], config), recent=16)
    again = codec.decompress_dump(codec.compress_dump(held))
    found = run(model, restore(model, again), tokens(name, 3, seed=3))
    if divergence(found, expected) == float("inf"):
        raise WrongError("predictions from a decompressed cache are not finite")
    return ""


def coded_kvtc(name: str, model: Any) -> str:
    """The codec that needs no sensitivity."""
    return _coded(name, model, KVTCConfig(compression_ratio=4), measured=False)


def coded_kvtc_rd(name: str, model: Any) -> str:
    """The codec that spends bits by sensitivity."""
    return _coded(name, model, KVTCRDConfig(), measured=True)


def planned(name: str, model: Any) -> str:
    """What `mlxkv plan` says is what caches hold after a real text, to the byte; smartkv may leave some of its budget.

    A plan is of 2 bytes a number, and MLX computes some of these models in float32 only: mlx-lm's own caches are compared in
    float32, and what is planned from the configuration alone with that.
    """
    traced, from_config = TracedModel(name, model), TracedModel(*build_model(configuration(name)))
    if [_facts(each) for each in traced.layers] != [_facts(each) for each in from_config.layers]:
        raise WrongError("layers are described otherwise from the configuration alone")
    if not any(isinstance(each, ArraysCache) for each in stock.entries(make_prompt_cache(model))):  # some are float32
        _same_bytes("the plan in 2 bytes", from_config.own(PROMPT).held, traced.own(PROMPT).held // 2)
    own = _after_text(name, model, make_prompt_cache(model))
    _same_bytes("mlx-lm's own cache", traced.own(PROMPT).held, own)
    for bits in (8, 4):
        _same_bytes(f"--kv-bits {bits}", *_with_bits(name, model, traced, bits))
    for method, settings in METHODS.items():
        config = live_config(method, **settings)
        cache = expected = None
        with suppress(UnsupportedError):
            cache = make_cache(model, config)
        with suppress(UnsupportedError):
            expected = traced.live(cache_class_of(config), config, PROMPT).held
        if cache is None or expected is None:
            _same_bytes(method, expected, cache)
            continue
        try:
            real = _after_text(name, model, cache)
        except UnsupportedError:  # by what only a run shows: a mask that this method has no place for
            continue
        if method == "smartkv" and 0.85 * expected <= real <= expected:
            continue
        _same_bytes(method, expected, real)
    return ""


def _facts(layer: Any) -> Any:
    return layer and (layer, layer.use, layer.selects)


def _same_bytes(what: str, expected: int | None, real: Any) -> None:
    if expected != real:
        raise WrongError(f"{what} holds {real} bytes, planned {expected}")


def _with_bits(name: str, model: Any, traced: TracedModel, bits: int) -> tuple[int | None, int | None]:
    """Bytes as planned and real with mlx-lm's quantized caches; None where it fails."""
    cache = make_prompt_cache(model)
    try:
        run(model, cache, tokens(name, PROMPT - 1))
        cache = [each.to_quantized(64, bits) if hasattr(each, "to_quantized") else each for each in cache]
        run(model, cache, tokens(name, PROMPT)[-1:])
        real = used_bytes(cache)
    except Exception:  # noqa: BLE001  # whatever mlx-lm raises
        real = None
    try:
        return traced.quantized(PROMPT, 1, bits).held, real
    except UnsupportedError:
        return None, real


def _after_text(name: str, model: Any, cache: list) -> int:
    text = tokens(name, PROMPT)
    run(model, cache, text[:-1])
    run(model, cache, text[-1:])
    return used_bytes(cache)


def used_bytes(cache: list) -> int:
    """Bytes of the rows that a prompt cache uses, without those that are only allocated."""
    total = 0
    for entry in stock.entries(cache):
        if isinstance(entry, LayerCache):
            parts = [entry.state_to_save()]
        elif isinstance(entry, QuantizedKVCache):
            parts = entry.keys_and_values() if entry.offset else ()
        elif type(entry) in stock.SAVED:
            parts = stock.used_state(type(entry).__name__, entry.state, entry) if not entry.empty() else ()
        else:
            total += entry.nbytes
            continue
        total += sum(array.nbytes for array in iter_arrays(list(parts)))
    return total


CHECKS: dict[str, Check] = {
    "dump": dumped_and_restored,
    "full": live_full,
    "methods": live_methods,
    "files": live_files,
    "kvtc": coded_kvtc,
    "kvtc-rd": coded_kvtc_rd,
    "planned": planned,
}

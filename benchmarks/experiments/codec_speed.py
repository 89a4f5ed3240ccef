"""Is reading a compressed cache faster than computing it again? Prefill, compress and decompress, in one run.

The three are timed in turn, several times over, so that a slow spell of the machine hits all of them; the ratio of
medians is the result. zmlx.kvtc, if it is installed, codes the same cache with 128 components, by artifacts made for it, to
compare with. Quick: 512 tokens, a small calibration and two rounds. On another language model: calibrated on 8 texts.
"""

from __future__ import annotations

import tempfile
from statistics import median
from time import perf_counter
from typing import Any

from mlx_lm.models.cache import make_prompt_cache

from benchmarks import calibration, texts
from benchmarks.experiments.rate_distortion import FULL, OTHER, QUICK
from benchmarks.schema import MODEL, Outcome, Result
from benchmarks.tables import table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import KVTCConfig, KVTCStream
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig
from mlxkv.codec.session import CacheCodec
from mlxkv.dump import KVDump
from mlxkv.spec import STREAMS

PHASE = 8
RATIOS, QUALITIES = (4, 16), (35, 25)
PEER_RANK = 128  # that zmlx.kvtc is used with


def run(quick: bool, model: str = MODEL) -> Outcome:
    loaded, tokenizer = lm.load(model)
    size = QUICK if quick else FULL if model == MODEL else OTHER
    length, rounds = (512, 2) if quick else (2048, 3)
    tokens = texts.same_kind(tokenizer, length, 1)[0]
    dump = lm.dump(loaded, tokens, name=model, dtype="float16")
    configs = [KVTCConfig(compression_ratio=ratio, rank=size.get("rank")) for ratio in RATIOS]
    with calibration.dumps(loaded, tokenizer, size) as files:
        *published, learnt, for_peer = calibration.learn(
            files, [*configs, KVTCRDConfig(), KVTCConfig(compression_ratio=RATIOS[-1], rank=PEER_RANK)]
        )
    ours, theirs = CacheCodec(learnt), peer(for_peer) if model == MODEL else None
    codecs: dict[str, Any] = {f"{ratio}x": CacheCodec(found) for ratio, found in zip(RATIOS, published)}
    codecs |= {f"kvtc-rd {quality}": ours.with_quality(quality) for quality in QUALITIES}
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as saved:
        published[-1].save(saved)
        for _ in range(rounds):
            start = perf_counter()
            lm.prefill(loaded, tokens, make_prompt_cache(loaded))
            samples.append({"step": "prefill", "seconds": perf_counter() - start})
            for name, codec in codecs.items():
                samples += timed(loaded, dump, name, codec)
            if theirs:
                samples += timed_peer(dump, theirs)
            start = perf_counter()
            CalibrationArtifacts.from_dir(saved)
            step = f"read the artifacts ({RATIOS[-1]}x), once a process"
            samples.append({"step": step, "seconds": perf_counter() - start})
    components = learnt.meta["components"]
    config = {"model": model, "tokens": length, "rounds": rounds, "calibration": size, "kvtc_rd_components": components}
    return Outcome(config, samples, summarise(samples))


def timed(model: Any, dump: KVDump, name: str, codec: CacheCodec) -> list[dict[str, Any]]:
    """Time compressing, decompressing, and decompressing back into mlx-lm."""
    start = perf_counter()
    blob = codec.compress_dump(dump)
    coded = perf_counter()
    back = codec.decompress_dump(blob)
    decoded = perf_counter()
    lm.restore(model, back)
    return [
        {"step": f"compress {name}", "seconds": coded - start, "bytes": len(blob)},
        {"step": f"decompress {name}", "seconds": decoded - coded},
        {"step": f"decompress {name} and restore into mlx-lm", "seconds": perf_counter() - coded},
    ]


def peer(artifacts: CalibrationArtifacts) -> Any:
    """Return zmlx.kvtc's codec with this calibration, or None where it is not installed."""
    try:
        from zmlx import kvtc as zmlx
    except ImportError:
        return None
    parts: dict[str, Any] = {}
    for name in STREAMS:
        part = artifacts.stream(name)
        assert isinstance(part, KVTCStream)
        plan = zmlx.QuantPlan([zmlx.GroupSpec(group.size, group.kind) for group in part.plan.groups])
        parts |= {f"{name}_mu": part.mu, f"{name}_V": part.V.astype("float32"), f"{name}_plan": plan}
    rope = artifacts.spec.stream("k").ropes[0]
    # Its flag means the contrary of MLX's.
    config = zmlx.RotaryConfig(rope.dims, rope.base, traditional=not rope.traditional) if rope else None
    return zmlx.KVTCCacheCodec(zmlx.CalibrationArtifacts(**parts, meta={}), rope_cfg=config)


def timed_peer(dump: KVDump, codec: Any) -> list[dict[str, Any]]:
    """Time zmlx.kvtc's compressing and decompressing."""
    start = perf_counter()
    blob = codec.compress(list(dump.k), list(dump.v))
    coded = perf_counter()
    codec.decompress(blob)
    name = f"zmlx.kvtc, {PEER_RANK} components"
    return [
        {"step": f"compress {name}", "seconds": coded - start, "bytes": len(blob)},
        {"step": f"decompress {name}", "seconds": perf_counter() - coded},
    ]


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians over the rounds, and how many times faster than prefill they are."""
    steps = dict.fromkeys(sample["step"] for sample in samples)
    seconds = {step: median(s["seconds"] for s in samples if s["step"] == step) for step in steps}
    return [
        {
            "step": step,
            "median_seconds": round(value, 3),
            "times_faster_than_prefill": round(seconds["prefill"] / value, 1),
        }
        for step, value in seconds.items()
    ]


def brief(result: Result) -> str:
    """Say what a README shows: the finding without its table."""
    return section(result).partition("\n")[0]


def section(result: Result) -> str:
    rows, config = result["summary"], result["config"]
    back = [row["times_faster_than_prefill"] for row in rows if row["step"].endswith("restore into mlx-lm")]
    verdict = "Yes" if min(back) > 1 else "No" if max(back) < 1 else "At some ratios"
    found = (
        f"{verdict}: reading {config['tokens']:,} tokens back into mlx-lm is {min(back):.1f} to {max(back):.1f} times as fast"
        f" as computing them again (medians of {config['rounds']} rounds in turn)."
    )
    cells = [[row["step"], f"{row['median_seconds']:.2f}", f"{row['times_faster_than_prefill']:.1f}"] for row in rows]
    return f"{found}\n\n{table(('step', 'seconds', 'times faster than prefill'), cells)}"

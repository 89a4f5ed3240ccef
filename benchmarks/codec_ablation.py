"""What each part of KVTC earns on SmolLM2: one part changed at a time, compared with the method in the same bytes of file.

Ten held-out texts (two of the calibration's kind, eight of others) of 768 tokens each are coded and the next 100 predicted,
all in one chunk: KL to the whole cache. Bytes are those of the whole file: header, tokens, raw sinks and window included.
What a change does is its KL over the one that the method, coded at several ratios, has in as many bytes, read off a
straight line in the logarithms of both. Without a raw window a file is so much smaller that its codes get more bits.

Every plan may use the first 4,096 components, or as many as the calibration has. The changed plans code groups of 64
components. "Water-filling" gives each the type whose bits are nearest to the rate of a Gaussian of its variance, and lowers
the water level until the budget is spent. With a basis for each layer the components of all layers share one plan, strongest
first. Sinks are left out of the calibration also where they are coded. Quick: two texts, a small calibration, half of the changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.progress import track

from benchmarks import held_out, paired, texts
from benchmarks.held_out import MODEL
from benchmarks.schema import Outcome, Result
from benchmarks.tables import interval, megabytes, table
from mlxkv import lm
from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.methods.kvtc import MAX_ERROR_TOKENS, KVTCConfig, KVTCStream, group_errors
from mlxkv.codec.session import CacheCodec
from mlxkv.codec.stages.pca import principal_components
from mlxkv.codec.stages.plan import ErrorTable, Group, Plan, allocate, cost
from mlxkv.codec.stages.rows import to_rows
from mlxkv.dump import KVDump
from mlxkv.evaluate.tasks import fidelity
from mlxkv.evaluate.variants import baseline, codec_variant
from mlxkv.kernels.groups import BITS
from mlxkv.spec import STREAMS, CacheSpec, Stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PHASE = 4
RANK, QUICK_RANK = 4096, 512
RATIO = 8
LENGTH, PREDICT = 768, 100
GROUP = 64  # components, of the plans without the dynamic programme
SURE = 0.05  # corrected p below which a difference is called shown


class Directions(NamedTuple):
    """mean: `[p]`. V: `[p, r]` float16. energy: `[r]`, mean squared coefficients. errors: of `group_errors`."""

    mean: np.ndarray
    V: np.ndarray
    energy: np.ndarray
    errors: ErrorTable


@dataclass(frozen=True)
class Change:
    """How a file is made; the defaults are the method's. plan: a name in PLANS. layered: one basis for each layer."""

    ratio: float = RATIO
    s: int = 4
    w: int = 128
    plan: str = "dynamic programme"
    layered: bool = False
    rotated: bool = False
    lossless: str = "deflate"


CURVE = {f"kvtc at {ratio}x": Change(ratio) for ratio in (4, RATIO, 16)}
CHANGES = {
    "sinks coded": Change(s=0),
    "no raw window, codes at 4x": Change(4, w=0),
    "raw window of 32, codes at 4x": Change(4, w=32),
    "int4 for all that is kept": Change(plan="int4"),
    "water-filling": Change(plan="water-filling"),
    "a basis for each layer": Change(layered=True),
    "keys coded as rotated": Change(rotated=True),
    "rANS for DEFLATE": Change(lossless="rans"),
}
QUICK = ("sinks coded", "keys coded as rotated")


def run(quick: bool) -> Outcome:
    model, tokenizer = lm.load(MODEL)
    length, rank = (LENGTH // 2, QUICK_RANK) if quick else (LENGTH, RANK)
    kinds, rows = held_out.rows(MODEL, tokenizer, length + PREDICT + 1)
    chosen = {**CURVE, **CHANGES}
    calibration = {"texts": 4, "tokens": 1536}
    if quick:
        kinds, rows = kinds[::5], rows[::5]
        chosen = {**CURVE, **{name: CHANGES[name] for name in QUICK}}
        calibration = {"texts": 2, "tokens": 768}
    made = codecs(chosen, dumps(model, tokenizer, calibration), rank)
    variants = [baseline(), *(codec_variant(codec, name, "float16") for name, codec in made.items())]
    samples = [
        {"text": kind, **record}
        for kind, row in track(list(zip(kinds, rows.tolist())), "held-out texts")
        for record in fidelity.evaluate(model, variants, row, length, chunk=PREDICT)[1:]
    ]
    config = {
        "model": MODEL, "dtype": "float16", "calibration": calibration, "rank": rank, "length": length, "predict": PREDICT,
        "settings": {name: asdict(change) for name, change in chosen.items()}, "curve": list(CURVE), "seed": 0,
    }  # fmt: skip
    return Outcome(config, samples, summarise(samples))


def dumps(model: Any, tokenizer: Any, calibration: dict[str, int]) -> list[KVDump]:
    """The caches that bases and plans are learnt from."""
    stretches = texts.calibration(tokenizer, calibration["tokens"], calibration["texts"])
    return [lm.dump(model, tokens, name=MODEL, dtype="float16") for tokens in track(stretches, "calibration")]


def codecs(changes: dict[str, Change], seen: Sequence[KVDump], rank: int) -> dict[str, CacheCodec]:
    """A codec for each change. What several of them need is learnt once."""
    learn = cache(partial(directions, seen, rank))
    made: dict[str, CacheCodec] = {}
    for name, change in track(changes.items(), "bases and plans"):
        spec = unrotated(seen[0].spec) if change.rotated else seen[0].spec
        parts = {}
        for stream in map(spec.stream, STREAMS):
            found = learn(stream, change.layered)
            plan = PLANS[change.plan](found, KVTCConfig(change.ratio).budget(stream.width))
            parts[stream.name] = KVTCStream(found.mean, found.V[:, : plan.rank], plan)
        artifacts = CalibrationArtifacts(
            **parts, spec=spec, meta={"method": "kvtc", "model_fingerprint": seen[0].fingerprint}
        )
        made[name] = AsGiven(artifacts, change, seen[0].spec)
    return made


def unrotated(spec: CacheSpec) -> CacheSpec:
    """The same cache with keys that are taken as they are, rotation and all."""
    layers = (slots and (replace(slots[0], rope=None), replace(slots[1], rope=None)) for slots in spec.layers)
    return replace(spec, layers=tuple(layers))


class AsGiven(CacheCodec):
    """Codes dumps of `spec` and believes its artifacts about their rotation."""

    def __init__(self, artifacts: CalibrationArtifacts, change: Change, spec: CacheSpec) -> None:
        super().__init__(artifacts, change.w, change.s, lossless=change.lossless)
        self.spec = spec

    def compress_dump(self, dump: KVDump, progress: Any = None) -> bytes:
        return super().compress_dump(replace(dump, spec=self.artifacts.spec), progress)

    def decompress_dump(self, blob: Any, progress: Any = None, *, tokens: Any = None) -> KVDump:
        return replace(super().decompress_dump(blob, progress, tokens=tokens), spec=self.spec)


def directions(seen: Sequence[KVDump], rank: int, stream: Stream, layered: bool) -> Directions:
    """Principal components of a stream's rows, as `calibrate` finds them, or those of each layer's part alone."""
    parts = [to_rows(stream, list(dump.stream(stream.name)), KVTCConfig.s, dump.length) for dump in seen]
    rows = np.concatenate([np.array(part) for part in parts])
    mean, V = by_layer(rows, stream.layers) if layered else principal_components(rows, rank)
    coefficients = rows @ V
    energy = np.square(coefficients, dtype=np.float64).mean(axis=0)
    if layered:
        strongest = np.argsort(-energy, kind="stable")[:rank]
        V, coefficients, energy = V[:, strongest], coefficients[:, strongest], energy[strongest]
    errors = group_errors(coefficients[:: -(-len(coefficients) // MAX_ERROR_TOKENS)])
    return Directions(mean, V.astype(np.float16), energy, errors)


def by_layer(rows: np.ndarray, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[p]` and block-diagonal components `[p, p]` of rows `[N, p]`, centred in place, with N > p / layers."""
    width = rows.shape[1] // layers
    mean, V = np.empty(rows.shape[1], np.float32), np.zeros((rows.shape[1],) * 2, np.float32)
    for start in range(0, rows.shape[1], width):
        part = slice(start, start + width)
        mean[part], V[part, part] = principal_components(rows[:, part], width)
    return mean, V


def programmed(found: Directions, budget: int) -> Plan:
    return allocate(found.energy, found.errors, budget)


def equal(found: Directions, budget: int) -> Plan:
    """int4 for as many of the strongest components as the budget pays for."""
    return Plan((Group(GROUP, "int4"),) * min(budget // cost(GROUP, "int4"), len(found.energy) // GROUP))


def water_filled(found: Directions, budget: int) -> Plan:
    """Reverse water-filling on the groups' variances, rounded to the codec's types.

    A group of variance v has the rate log2(v / level) / 2, and takes the next type where that is half-way to its bits.
    """
    kinds = sorted(BITS, key=lambda kind: BITS[kind])
    bits = np.array([BITS[kind] for kind in kinds])
    variances = found.energy[: len(found.energy) // GROUP * GROUP].reshape(-1, GROUP).mean(axis=1)
    levels = variances[:, None] / 4.0 ** ((bits[:-1] + bits[1:]) / 2)  # [groups, 3], falling: each group's steps
    prices = np.broadcast_to(np.diff([cost(GROUP, kind) for kind in kinds]), levels.shape)
    order = np.argsort(-levels, axis=None, kind="stable")
    paid = order[np.cumsum(prices.ravel()[order]) <= budget]
    steps = np.bincount(paid // levels.shape[1], minlength=len(variances))
    return Plan(tuple(Group(GROUP, kinds[step]) for step in steps))


PLANS: dict[str, Callable[[Directions, int], Plan]] = {
    "dynamic programme": programmed,
    "int4": equal,
    "water-filling": water_filled,
}


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each variant; of each change also how it compares with the method's curve, text by text."""
    points: dict[str, list[tuple[float, float]]] = {}
    for sample in samples:
        if sample["variant"] in CURVE:
            points.setdefault(sample["text"], []).append((sample["cache_bytes"], sample["kl"]))
    rows = []
    for variant in dict.fromkeys(sample["variant"] for sample in samples):
        group = [sample for sample in samples if sample["variant"] == variant]
        kls = [sample["kl"] for sample in group]
        row = {
            "variant": variant,
            "file_bytes": round(fmean(sample["cache_bytes"] for sample in group)),
            "ratio": round(fmean(sample["ratio"] for sample in group), 3),
            "kl": float(np.exp(np.mean(np.log(np.maximum(kls, paired.LEAST_KL))))),
            "top1_agreement": round(fmean(sample["top1_agreement"] for sample in group), 4),
            "perplexity_delta": round(fmean(sample["perplexity_delta"] for sample in group), 4),
        }
        if variant not in CURVE:
            curves = [points[sample["text"]] for sample in group]
            row |= paired.compare(
                kls, [paired.at_bytes(sample["cache_bytes"], curve) for sample, curve in zip(group, curves)]
            )
            row["beyond_curve"] = sum(
                not min(curve)[0] <= sample["cache_bytes"] <= max(curve)[0] for sample, curve in zip(group, curves)
            )
        rows.append(row)
    compared = [row for row in rows if "p" in row]
    for row, p in zip(compared, paired.holm([row["p"] for row in compared])):
        row["p_corrected"] = p
    return rows


def section(result: Result) -> str:
    rows, config = result["summary"], result["config"]
    compared = [row for row in rows if "p" in row]
    worse = [row for row in compared if row["p_corrected"] < SURE and row["kl_ratio"] > 1]
    better = [row for row in compared if row["p_corrected"] < SURE and row["kl_ratio"] < 1]
    rest = [row for row in compared if row not in worse + better]
    said = {"More KL than the method in equal bytes": worse, "Less": better, "No difference shown": rest}
    verdicts = [f"{verdict}: {named(found)}." for verdict, found in said.items() if found]
    note = (
        f"{config['length']:,} tokens of {compared[0]['texts']} texts; KL is a geometric mean. p is that of all sign flips,"
        f" corrected as Holm does for {len(compared)} comparisons; below {SURE} a difference counts as shown."
    )
    beyond = [row["variant"] for row in compared if row["beyond_curve"]]
    if 2 ** (1 - compared[0]["texts"]) * len(compared) >= SURE:
        note += " So few texts cannot show any."
    if beyond:
        note += f" Files outside of the method's curve, so held against its end: {', '.join(beyond)}."
    heads = ("variant", "file", "ratio", "KL", "times KL in equal bytes", "95 %", "less on", "p", "p corrected")
    return "\n\n".join([" ".join(verdicts), note, table(heads, map(cells, rows))])


def named(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{row['variant']} ({row['kl_ratio']:.2f} times)" for row in rows)


def cells(row: dict[str, Any]) -> list[str]:
    first = [row["variant"], megabytes(row["file_bytes"]), f"{row['ratio']:.1f}x", f"{row['kl']:.4f}"]
    if "p" not in row:
        return [*first, *[""] * 5]
    less = f"{row['better_on']} of {row['texts']}"
    ps = (f"{row[key]:.3f}" for key in ("p", "p_corrected"))
    return [*first, f"{row['kl_ratio']:.2f}", interval(*row["kl_ratio_interval"]), less, *ps]


def figure(result: Result) -> Figure:
    """KL of every change over the method's in equal bytes, with 95 % intervals."""
    from benchmarks import figures

    rows = sorted((row for row in result["summary"] if "p" in row), key=lambda row: row["kl_ratio"])
    drawn, ((axes,),) = figures.panes(width=6.5, height=0.9 + 0.32 * len(rows))
    for place, row in enumerate(rows):
        color, marker = (figures.COLORS[1], "s") if row["p_corrected"] < SURE else (figures.COLORS[-1], "o")
        axes.plot(row["kl_ratio_interval"], [place, place], color=color)
        axes.plot([row["kl_ratio"]], [place], color=color, marker=marker)
    axes.axvline(1, color=figures.COLORS[0], ls=":")
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.set(xscale="log", xlabel="KL over kvtc's in equal bytes, 95 % (squares: shown after correction)")
    return drawn

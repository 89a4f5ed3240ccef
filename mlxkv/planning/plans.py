"""A plan: the bytes of every kind of cache for one model and length, what fits, and what it costs in predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlxkv.errors import InputError, UnsupportedError
from mlxkv.live.base import cache_class_of, live_methods
from mlxkv.live.seam import live_config
from mlxkv.planning.building import Weights, build_model, weigh
from mlxkv.planning.caches import Size, TracedModel, windows
from mlxkv.planning.configs import read_config, trained_context
from mlxkv.planning.measured import Measurement, measured, measurements
from mlxkv.presets import presets_of
from mlxkv.spec import Layer, is_int

FAR = 2**20  # tokens after which a cache that does not grow with every token has stopped
MOST_CONTEXT, MOST_TEXTS, MOST_MEMORY = 2**24, 2**12, 2**50
BITS = (8, 4)
BITS_START = 5000  # tokens from which on mlx-lm quantizes with --kv-bits, unless told otherwise
LARGE_MEMORY = 36 * 10**9  # from here on Metal recommends 3/4 of a Mac's memory for the GPU, below 2/3

Sizes = Callable[[int], Size]


@dataclass(frozen=True)
class PlannedCache:
    """One kind of cache in a plan.

    Parameters
    ----------
    cache
        "fp16", an option of mlx-lm's, a preset, or a kind of file.
    kind
        "mlx-lm", "live" or "file".
    method
        The live method; empty for other kinds.
    bytes
        Bytes after the text; None where it is refused.
    share
        Of the bytes of mlx-lm's own cache in 16 bits.
    reading_bytes
        Bytes at most while the prompt is read: mlx-lm's windows hold a chunk of 2,048 tokens more.
    grows
        Whether a longer text takes more bytes.
    fits
        Whether weights and cache fit into the memory that is left to them; None where no memory was given, the size of the
        weights is not known, and for files.
    longest_context
        Most tokens with which it fits, to a thousandth; 0 where not one does. None as for `fits`, and where any length fits.
    measurement
        What it cost on a model that was measured; None where nothing was.
    note
        What else to know, such as why it is refused.
    """

    cache: str
    kind: str
    method: str = ""
    bytes: int | None = None
    share: float | None = None
    reading_bytes: int | None = None
    grows: bool | None = None
    fits: bool | None = None
    longest_context: int | None = None
    measurement: Measurement | None = None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What the caches of a model take.

    Parameters
    ----------
    model_type
        The module of mlx-lm that implements the model.
    context
        Length of the text in tokens.
    batch
        Number of texts.
    layers
        For each entry of the prompt cache a `Layer`, or None where it keeps other state.
    trained_context
        Tokens that the model was made for; None where its config does not say.
    weights
        Their size, estimated.
    memory
        Bytes of the machine; None where not given.
    usable_bytes
        Bytes of it for weights and cache: the share that Metal recommends.
    caches
        mlx-lm's own first, then live ones by falling size, then files.
    """

    model_type: str
    context: int
    batch: int
    layers: tuple[Layer | None, ...]
    trained_context: int | None
    weights: Weights
    memory: int | None
    usable_bytes: int | None
    caches: tuple[PlannedCache, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values.

        Returns
        -------
        dict
            The fields; layers as counts of each kind, and the KL divergence beside each measurement.
        """
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        caches = []
        for each in self.caches:
            row = {**vars(each), "measurement": each.measurement and each.measurement._asdict()}
            caches.append({**row, "kl": each.measurement and each.measurement.kl})
        return {**plain, "layers": self.kinds(), "weights": self.weights._asdict(), "caches": caches}

    def kinds(self) -> list[dict[str, Any]]:
        """Return how many layers there are of each kind.

        Returns
        -------
        list of dict
            `layers`, their number; `window`; `keys` and `values`, heads and dims, or None for other state.
        """
        counts: dict[tuple[Any, ...], int] = {}
        for layer in self.layers:
            shapes = (None, None) if layer is None else tuple((slot.heads, slot.dim) for slot in layer)
            key = (layer and layer.window, *shapes)
            counts[key] = counts.get(key, 0) + 1
        return [
            {"layers": count, "window": window, "keys": keys and [*keys], "values": values and [*values]}
            for (window, keys, values), count in counts.items()
        ]


def plan(
    config: Mapping[str, Any] | str | Path,
    context: int,
    *,
    batch: int = 1,
    memory: int | None = None,
    presets: Sequence[str] | None = None,
) -> Plan:
    """Say what the caches of a model take, from its configuration alone: no weight is loaded or computed.

    Parameters
    ----------
    config
        The content of a config.json; or where to find one: a model's folder, the file, a hub id, the name of a bundled model.
    context
        Length of the text in tokens, 1 to 16,777,216.
    batch
        Number of texts of that length, 1 to 4,096.
    memory
        Bytes of the machine, to say what fits.
    presets
        Presets or names of live methods to plan; all presets if None.

    Returns
    -------
    Plan
        Bytes of each kind of cache, of the text without rows that are only allocated.

    Raises
    ------
    InputError
        For numbers out of range, and a configuration that no model can be built from.
    ModelNotFoundError
        When there is no configuration of that name.
    FormatError
        When the file is no JSON.
    UnsupportedError
        When mlx-lm has no such model type, or it cannot be traced.

    Examples
    --------
    >>> config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
    ...     "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 256}
    >>> found = plan(config, 1024, presets=["int8"])
    >>> [(each.cache, each.bytes) for each in found.caches if each.kind != "file"][0]
    ('fp16', 262144)
    """
    for name, value, most in (("context", context, MOST_CONTEXT), ("batch", batch, MOST_TEXTS)):
        if not is_int(value, 1, most):
            raise InputError(f"{name} is 1 to {most:,}, not {str(value)[:40]}")
    if not (memory is None or is_int(memory, 1, MOST_MEMORY)):
        raise InputError(f"memory is a number of bytes, 1 to {MOST_MEMORY:,}, not {str(memory)[:40]}")
    if not isinstance(config, Mapping):
        config = read_config(config)
    name, model = build_model(config)
    traced = TracedModel(name, model)
    weights = weigh(model, config)
    usable = None if memory is None else usable_bytes(memory)
    room = None if usable is None or weights.bytes is None else usable - weights.bytes
    own, live, files = _rows(traced, context, batch, room, presets)
    caches = (*own, *sorted(live, key=lambda each: -(each.bytes or 0)), *files)
    made_for = trained_context(config)
    return Plan(name, context, batch, traced.layers, made_for, weights, memory, usable, caches)


def usable_bytes(memory: int) -> int:
    """Return how much of a Mac's memory weights and caches may take.

    Metal recommends a working set for the GPU, `max_recommended_working_set_size` of `mx.device_info()`, which mlx-lm sets as its
    limit. It is 2/3 of 8 to 32 GB, and 3/4 or a little more of 36 GB and up; the rest is for the system and other programs.

    Parameters
    ----------
    memory
        Bytes of the machine.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> usable_bytes(96 * 10**9)
    72000000000
    """
    return memory * 3 // 4 if memory >= LARGE_MEMORY else memory * 2 // 3


def _rows(
    traced: TracedModel, context: int, batch: int, room: int | None, presets: Sequence[str] | None
) -> tuple[list[PlannedCache], list[PlannedCache], list[PlannedCache]]:
    """Return mlx-lm's caches, live ones, and files."""
    like = windows(traced.layers)
    whole = traced.own(context, batch).held

    def row(cache: str, kind: str, sizes: Sizes, method: str = "", note: str = "") -> PlannedCache:
        found = PlannedCache(cache, kind, method, measurement=measured(cache, like), note=note)
        try:
            found = _with_sizes(found, sizes, context, room, whole)
        except UnsupportedError as error:
            return dataclasses.replace(found, note=error.message, measurement=None)
        if cache != "fp16" and kind == "mlx-lm" and found.bytes == whole:
            as_it_is = "mlx-lm leaves the caches of this model as they are"
            return dataclasses.replace(found, note=as_it_is, measurement=None)
        return found

    late = f"begins after {BITS_START:,} tokens, or where --quantized-kv-start says" if context < BITS_START else ""
    own = [row("fp16", "mlx-lm", partial(traced.own, batch=batch))]
    own += [row(f"--kv-bits {n}", "mlx-lm", partial(traced.quantized, batch=batch, bits=n), note=late) for n in BITS]
    live = []
    for preset in presets_of(live_methods.names()) if presets is None else presets:
        config = live_config(preset)
        method = cache_class_of(config)
        sizes = partial(traced.live, method, config, batch=batch)
        live.append(row(preset, "live", sizes, live_methods.name_of(method)))
    return own, live, list(_files(traced, whole, like))


def _with_sizes(row: PlannedCache, sizes: Sizes, context: int, room: int | None, whole: int) -> PlannedCache:
    """Return a row with its bytes, and what fits into a room."""
    (held, reading), far = sizes(context), sizes(FAR)
    grows = far.held > 1.5 * sizes(FAR // 2).held
    always = room is None or (not grows and far.peak <= room)
    return dataclasses.replace(
        row,
        bytes=held,
        share=held / whole if whole else None,
        reading_bytes=reading,
        grows=grows,
        fits=None if room is None else reading <= room,
        longest_context=None if always else _longest(lambda tokens: sizes(tokens).peak, room or 0, context),
    )


def _files(traced: TracedModel, whole: int, like: bool) -> Iterator[PlannedCache]:
    """Yield the files whose share of the bytes was measured; longer texts than those have a smaller one."""
    for name in dict.fromkeys(each.cache for each in measurements() if each.cache.endswith(" file")):
        found = measured(name, like)
        if found is not None and traced.spec is not None:
            setting = f"at {found.setting}; " if found.setting else ""
            note = f"{setting}estimated: the share of a text of {found.tokens:,} tokens"
            size = round(found.share * whole)
            yield PlannedCache(name, "file", "", size, found.share, grows=True, measurement=found, note=note)


def _longest(size: Callable[[int], int], room: int, start: int) -> int:
    """Return the most tokens whose bytes fit into a room, to a thousandth; bytes grow with tokens, nearly in proportion."""
    low, high = 0, MOST_CONTEXT + 1
    guess, step = start, 0
    while high - low > max(1, low >> 10):
        if size(guess) <= room:
            low = guess
        else:
            high = guess
        # In turn: where a line leads, a little further on, and the middle, for sizes that are no line.
        middle = (low + high) // 2
        near = (_in_proportion(size, room, low or guess), low + max(1, low >> 10), middle)[step % 3]
        guess, step = near if low < near < high else middle, step + 1
    return low


def _in_proportion(size: Callable[[int], int], room: int, tokens: int) -> int:
    """Return where the line through the sizes at and around a length reaches a room."""
    less = max(1, tokens // 2)
    rise = size(tokens) - size(less)
    return tokens + (room - size(tokens)) * (tokens - less) // rise if rise > 0 else MOST_CONTEXT

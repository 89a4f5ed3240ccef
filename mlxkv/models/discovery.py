"""Description of any model's cache, from one small run of the model.

What is concluded, for each entry of the prompt cache:

- Its slots are what the model hands to `update_and_fetch`.
- A slot is rotated where its array, or a slice of the last axis, is the output of `mx.fast.rope` at the cache's own positions.
  Where that cannot be shown (no rotation; a norm after it; keys expanded from a latent) it counts as not rotated, which
  costs bytes and never exactness.
- Multi-head latent attention decodes with the latent as keys and as values.
- An entry that no attention call gets and that holds keys alone belongs to an indexer; its neighbour's tokens are chosen by index.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import CacheList, RotatingKVCache

from mlxkv.errors import FormatError, UnsupportedError
from mlxkv.models import probe
from mlxkv.models.probe import Attention, Pass, Probe, Rotation, Update
from mlxkv.spec import CacheSpec, Layer, Rope, Slot

_TOLERANCE = 1e-4  # of a rotation's output, relative to its largest value: the same numbers by another path
_known: dict[int, tuple[weakref.ref[Any], CacheSpec]] = {}
_lock = threading.Lock()


def discover(model: Any, name: str) -> CacheSpec:
    """Describe the cache of a model that has no adapter. A model is run once; later calls remember.

    Parameters
    ----------
    model
        A loaded mlx-lm model.
    name
        Its type, for the description.

    Returns
    -------
    CacheSpec
        The description.

    Raises
    ------
    UnsupportedError
        When the model cannot be run, or no entry of its prompt cache keeps keys and values.
    """
    with _lock:
        reference, spec = _known.get(id(model), (lambda: None, None))
    if spec is not None and reference() is model:
        return spec
    try:
        found = probe.run(model)
    except Exception as error:  # whatever the model raises is the reason
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"a {name} model cannot be run to look at its cache: {reason[0] if reason else repr(error)}"
        ) from error
    spec = CacheSpec(name, describe(found))
    key = id(model)
    with _lock:
        _known[key] = weakref.ref(model, lambda _: _known.pop(key, None)), spec
    return spec


def describe(found: Probe, rotations: bool = True) -> tuple[Layer | None, ...]:
    """Return what a watched run says of each entry.

    Parameters
    ----------
    found
        The run.
    rotations
        Whether to look for rotations, for which numbers have to be computed.

    Returns
    -------
    tuple[Layer or None, ...]
        None for an entry that keeps no keys and values of an attention layer.
    """
    indexers = {index for index in range(len(found.entries)) if _is_indexer(found, index)}
    selected = _neighbours(found, indexers)
    layers: list[Layer | None] = []
    for index, entry in enumerate(found.entries):
        updates = [each.updates.get(index, []) for each in found.passes]
        # A cache that is filled twice in a pass, or not in all, is no list of the tokens.
        regular = all(len(part) == 1 for part in updates) and not getattr(entry, "keep", 0)
        if regular and index not in indexers:
            updated = [part[0] for part in updates]
            layers.append(_layer(found, entry, updated, index in selected, rotations))
        else:
            layers.append(None)
    return tuple(layers)


def _layer(found: Probe, entry: Any, updates: Sequence[Update], selects: bool, rotations: bool) -> Layer:
    """Describe an entry that keeps keys and values."""
    latent = _is_latent(found, entry)
    arrays = updates[0].taken
    names = ("latent", "k_pe") if latent else ("keys", "values")
    # Values are hardly ever rotated: they are only compared as objects.
    passes = found.passes if rotations else []
    ropes = [_rope(passes, updates, slot, by_numbers=latent or not slot) for slot in (0, 1)]
    keys, values = (Slot(n, x.shape[1], x.shape[3], rope) for n, x, rope in zip(names, arrays, ropes))
    window = entry.max_size if isinstance(entry, RotatingKVCache) else None
    through_seam = all(_is_seam(each, entry, update, latent) for each, update in zip(found.passes, updates))
    return Layer(keys, values, latent, window, "seam" if through_seam else "fetch", selects)


def _is_seam(each: Pass, entry: Any, update: Update, latent: bool) -> bool:
    """Return whether one attention call, and no other, gets the cache and what it returned."""
    keys, values = update.given
    getting = [call for call in each.attentions if call.cache is entry or _gets(call, keys) or _gets(call, values)]
    if len(getting) != 1 or getting[0].cache is not entry:
        return False
    call = getting[0]
    if latent:
        # A prompt attends to keys and values that are expanded from the latents.
        return update.offset == 0 or (call.keys is keys and call.values is keys)
    return call.keys is keys and call.values is values


def _gets(call: Attention, array: mx.array) -> bool:
    return call.keys is array or call.values is array


def _is_latent(found: Probe, entry: Any) -> bool:
    """Return whether decoding attends to one head of this entry both as keys and as values."""
    return any(
        call.keys is call.values and call.keys.shape[1] == 1 and entry in _caches_of(call)
        for call in found.passes[-1].attentions
    )


def _caches_of(call: Attention) -> Sequence[Any]:
    return call.cache.caches if isinstance(call.cache, CacheList) else [call.cache]


def _is_indexer(found: Probe, index: int) -> bool:
    """Return whether an entry holds keys alone, which no attention gets."""
    updates = [update for each in found.passes for update in each.updates.get(index, [])]
    without_values = all(v.shape[3] == 0 or v is k for k, v in (update.taken for update in updates))
    attended = any(
        call.cache is found.entries[index] or any(_gets(call, array) for update in updates for array in update.given)
        for each in found.passes
        for call in each.attentions
    )
    return bool(updates) and without_values and not attended


def _neighbours(found: Probe, indexers: set[int]) -> set[int]:
    """Return the entries that are in one list with an indexer."""
    near: set[int] = set()
    first = 0
    for entry in found.caches:
        members = range(first, first + (len(entry.caches) if isinstance(entry, CacheList) else 1))
        near |= set(members) if indexers & set(members) else set()
        first = members.stop
    return near


def _rope(passes: Sequence[Pass], updates: Sequence[Update], slot: int, by_numbers: bool) -> Rope | None:
    """Return the rotation that made a slot's arrays of all passes, None where none is shown to have."""
    counts = {len(each.rotations) for each in passes}
    if len(counts) != 1:
        return None
    arrays = [update.taken[slot] for update in updates]
    rotations = [[each.rotations[index] for each in passes] for index in range(counts.pop())]
    made = [found for found in rotations if all(map(_made, found, updates))]
    for numbers in (False, True)[: 1 + by_numbers]:  # all as objects first: numbers have to be computed
        for found in made:
            at = _place(arrays, found, numbers)
            if at is not None:
                return _describe_rotation(found, at)
    return None


def _made(rotation: Rotation, update: Update) -> bool:
    """Return whether a rotation's positions are those of the chunk that a cache takes in."""
    offset, tokens = rotation.settings.get("offset"), update.taken[0].shape[2]
    if isinstance(offset, mx.array):
        offset = offset.item() if offset.size == 1 else None
    return offset == update.offset and rotation.output.ndim == 4 and rotation.output.shape[2] == tokens


def _place(arrays: Sequence[mx.array], found: Sequence[Rotation], by_numbers: bool) -> int | None:
    """Return the dim at which the rotations' outputs begin within the arrays, None where they are elsewhere."""
    if all(rotation.output is array for rotation, array in zip(found, arrays)):
        return 0
    heads, width = arrays[0].shape[1], arrays[0].shape[3]
    rotated = found[0].output.shape[3]
    if not by_numbers or rotated > width or found[0].output.shape[1] not in (1, heads):
        return None
    for at in dict.fromkeys((0, width - rotated)):
        if all(_agree(array[..., at : at + rotated], rotation.output) for array, rotation in zip(arrays, found)):
            return at
    return None


def _agree(part: mx.array, output: mx.array) -> bool:
    """Return whether two arrays hold the same numbers, which are not all 0."""
    a, b = (np.array(x.astype(mx.float32)) for x in (part, output))
    largest = float(np.abs(b).max(initial=0))
    return largest > 0 and float(np.abs(a - b).max()) <= _TOLERANCE * largest


def _describe_rotation(found: Sequence[Rotation], at: int) -> Rope | None:
    """Return a rotation that is the same in all passes."""
    described = set()
    for rotation in found:
        freqs, base = rotation.settings.get("freqs"), rotation.settings.get("base")
        try:
            described.add(
                Rope(
                    int(rotation.dims),
                    offset=at,
                    base=None if base is None or freqs is not None else float(base),
                    freqs=None if freqs is None else tuple(freqs.tolist()),
                    traditional=bool(rotation.settings.get("traditional", False)),
                    scale=float(rotation.settings.get("scale", 1.0)),
                )
            )
        except FormatError:
            return None
    return described.pop() if len(described) == 1 else None

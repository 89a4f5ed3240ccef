"""Single caches that become rows of a batch, and rows that leave it: copies, which share arrays until one is written to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxkv.errors import MismatchError, UnsupportedError
from mlxkv.live.group import CacheGroup
from mlxkv.live.trial import check_batches

if TYPE_CHECKING:
    from mlxkv.live.base import LayerCache
    from mlxkv.live.batch import LiveBatch
    from mlxkv.live.rows import BatchedRows


def merge(caches: Sequence[Any]) -> LiveBatch:
    """Make a batch of the caches of several requests, which stay as they are.

    Parameters
    ----------
    caches
        Live caches of one layer, each of one text or still empty.

    Returns
    -------
    LiveBatch
        Its rows are copies, in the order of the caches.

    Raises
    ------
    MismatchError
        When they are not all live caches of one layer of one model, or one holds several texts, or a chunk that was not
        attended.
    UnsupportedError
        For a model that does not take batches; the first time, this runs a few tokens through it.
    """
    from mlxkv.live.batch import LiveBatch

    for row in caches:
        _check_mergeable(row, caches[0])
    group: CacheGroup | None = caches[0].group
    if group is not None and (model := group.model()) is not None:
        check_batches(model, group.offsets)
    return LiveBatch([copied_row(row, place) for place, row in enumerate(caches)])


def _check_mergeable(row: Any, first: LayerCache) -> None:
    """Refuse what cannot be a row beside another."""
    if getattr(row, "merge", None) is not merge:
        raise MismatchError(
            f"a {type(row).__name__} and a live {first.method_name} cache cannot be in one batch: make the caches of all "
            "requests by mlxkv.make_cache"
        )
    if row.layer != first.layer or (row.spec is not first.spec and row.spec != first.spec):
        raise MismatchError("caches of different layers or models cannot be in one batch")
    if row._pending_chunk is not None:
        raise MismatchError("a call of the model with one of these caches was interrupted; start again with a new one")
    if row.offset and (texts := row.buckets()[0][0].shape[0]) != 1:
        raise MismatchError(f"a cache of {texts} texts cannot become one row of a batch: make one cache for each text")


def check_whole(batch: BatchedRows) -> None:
    """Check that no call of the model is under way, or was interrupted.

    Parameters
    ----------
    batch
        One layer's batch.

    Raises
    ------
    UnsupportedError
        When a chunk was not attended.
    """
    if batch._pending_chunk is not None:
        raise UnsupportedError(
            "the last chunk of this batch of live caches was not attended: call mlxkv.attach(model) before running the "
            "model; after an interrupted call start again with new caches"
        )


def check_extends(batch: BatchedRows, other: Any) -> None:
    """Check that the rows of a batch can go on beside those of another.

    Parameters
    ----------
    batch, other
        Two batches.

    Raises
    ------
    MismatchError
        When the second is no batch of live caches, or of another layer or model.
    UnsupportedError
        When a call of the model with one of them was interrupted.
    """
    if type(other) is not type(batch):
        raise MismatchError(
            f"a {type(other).__name__} cannot extend a batch of live caches: make the caches of all requests by "
            "mlxkv.make_cache"
        )
    if other.layer != batch.layer or (other.spec is not batch.spec and other.spec != batch.spec):
        raise MismatchError("batches of different layers or models cannot become one")
    check_whole(batch)
    check_whole(other)


def copied_row(row: LayerCache, place: Hashable) -> LayerCache:
    """Return a copy of a layer's cache, which goes on without it.

    Parameters
    ----------
    row
        The cache.
    place
        What tells this copy from others of the same prompt cache: copies of its layers with one place share a group.

    Returns
    -------
    LayerCache
        The copy; no array is copied until either side writes to it.
    """
    memo: dict[int, Any] = {}
    keep_descriptions(row, memo)
    group = row.group
    if group is None:
        return copy.deepcopy(row, memo)
    memo[id(group)] = copied = group.copied(row.layer, place)
    row = copy.deepcopy(row, memo)
    row.join(copied)
    return row


def keep_descriptions(row: LayerCache, memo: MutableMapping[int, Any]) -> None:
    """Let `copy.deepcopy` share what never changes: settings, and the description of the model.

    Parameters
    ----------
    row
        A layer's cache.
    memo
        What `copy.deepcopy` gets.
    """
    for kept in (row._arguments, row.config, row.spec, row.slots):
        memo[id(kept)] = kept


class Mergeable:
    """Base of `LayerCache` with what mlx-lm looks for in caches that can be in a batch."""

    merge: Callable[[Sequence[Any]], LiveBatch] = staticmethod(merge)

"""Descriptions of a cache, outside any model: rotation, slots, layers.

It depends neither on mlx-lm nor on files or codecs.
"""

from __future__ import annotations

from mlxkv import _deprecated
from mlxkv.spec.bounds import MAX_DIM as MAX_DIM
from mlxkv.spec.bounds import MAX_HEADS as MAX_HEADS
from mlxkv.spec.bounds import MAX_LAYERS as MAX_LAYERS
from mlxkv.spec.bounds import is_int as is_int
from mlxkv.spec.cache import MODES as MODES
from mlxkv.spec.cache import CacheSpec as CacheSpec
from mlxkv.spec.cache import check_rope as check_rope
from mlxkv.spec.layers import STREAMS as STREAMS
from mlxkv.spec.layers import Group as Group
from mlxkv.spec.layers import Layer as Layer
from mlxkv.spec.layers import Slot as Slot
from mlxkv.spec.layers import Stream as Stream
from mlxkv.spec.rope import LEAST_ROPE as LEAST_ROPE
from mlxkv.spec.rope import MOST_ROPE as MOST_ROPE
from mlxkv.spec.rope import Rope as Rope

__getattr__ = _deprecated.renamed(__name__, {"fingerprint": "identity:fingerprint"})

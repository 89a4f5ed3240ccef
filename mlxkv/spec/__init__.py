"""Descriptions of a cache, outside any model: rotation, slots, layers, and the fingerprint of the weights that made it.

Knows nothing about mlx-lm, files or codecs.
"""

from mlxkv.spec.fingerprint import fingerprint as fingerprint
from mlxkv.spec.integers import is_int as is_int
from mlxkv.spec.layers import MODES as MODES
from mlxkv.spec.layers import STREAMS as STREAMS
from mlxkv.spec.layers import CacheSpec as CacheSpec
from mlxkv.spec.layers import Slot as Slot
from mlxkv.spec.layers import Stream as Stream
from mlxkv.spec.layers import check_rope as check_rope
from mlxkv.spec.rope import Rope as Rope

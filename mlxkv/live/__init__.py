"""Live caches: compressed while the model generates, through mlx-lm's own generation loop.

base.py defines what a method is, contract.py and rewinding.py what mlx-lm asks of any cache, group.py what the layers of one prompt
cache know of each other; seam.py connects methods to mlx-lm, and serialization.py saves caches, with
trees.py, checks.py and mlxkv/stock.py; methods/ has one file
per method. Base classes of several methods: windowing.py (sliding windows), packing.py (old tokens are quantized), selection.py (some tokens
are kept unchanged), sketching.py (the kept tokens are chosen by a sketch of attention). Building blocks: importance.py,
allocation.py, clustering.py, sketches.py.
"""

from mlxkv.live.base import LayerCache as LayerCache
from mlxkv.live.base import live_methods as live_methods
from mlxkv.live.seam import attach as attach
from mlxkv.live.seam import detach as detach
from mlxkv.live.seam import live_config as live_config
from mlxkv.live.seam import make_cache as make_cache

"""Live caches: small while the model runs, behind mlx-lm's own generation.

base.py says what a method is, seam.py puts methods into mlx-lm, serialization.py saves caches; methods/ has one file for
each method. What several methods share: packing.py (quantized old tokens), selection.py (tokens that stay), sketching.py
(tokens that stay by a sketch of attention), importance.py, allocation.py, clustering.py, sketches.py.
"""

from mlxkv.live.base import LayerCache as LayerCache
from mlxkv.live.base import live_methods as live_methods
from mlxkv.live.seam import attach as attach
from mlxkv.live.seam import detach as detach
from mlxkv.live.seam import live_config as live_config
from mlxkv.live.seam import make_cache as make_cache

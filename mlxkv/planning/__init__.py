"""What the caches of a model will take, before anything is downloaded: from its config.json alone."""

from __future__ import annotations

from mlxkv.planning.configs import read_config as read_config
from mlxkv.planning.plans import Plan as Plan
from mlxkv.planning.plans import PlannedCache as PlannedCache
from mlxkv.planning.plans import plan as plan
from mlxkv.planning.plans import usable_bytes as usable_bytes

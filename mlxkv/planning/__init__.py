"""Forecast of the bytes of a model's caches from its config.json alone, before anything is downloaded."""

from __future__ import annotations

from mlxkv.planning.configs import read_config as read_config
from mlxkv.planning.plans import Plan as Plan
from mlxkv.planning.plans import PlannedCache as PlannedCache
from mlxkv.planning.plans import plan as plan
from mlxkv.planning.plans import usable_bytes as usable_bytes

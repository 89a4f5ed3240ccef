"""Liquid LFM2 mixture of experts (LFM2-8B-A1B): the layers that cache are LFM2's."""

from mlxkv.models import adapters
from mlxkv.models.lfm2 import spec as spec

adapters.register("lfm2_moe")(spec)

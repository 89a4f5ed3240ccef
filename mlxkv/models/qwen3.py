"""Qwen3: rotated, RMS-normed keys and values on every layer, with the attributes of Llama."""

from mlxkv.models import adapters
from mlxkv.models.llama import spec as spec

adapters.register("qwen3")(spec)

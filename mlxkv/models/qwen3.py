"""Qwen3: rotated, RMS-normed keys and values on every layer, the same attributes as Llama."""

from mlxkv.models.llama import spec as spec

"""Qwen3 mixture of experts: attention is Qwen3's, only the feed-forward part differs."""

from mlxkv.models import adapters
from mlxkv.models.llama import spec as spec

adapters.register("qwen3_moe")(spec)

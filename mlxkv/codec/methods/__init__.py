"""Codec methods, one per file: settings, artifacts, a coder of blocks, and a `CodecMethod` that registers itself."""

from mlxkv.codec.methods.base import codec_methods as codec_methods

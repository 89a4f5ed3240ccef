"""Conversations that outlive the process: messages and their tokens, a cache that runs, and the file that it is saved in."""

from __future__ import annotations

from mlxkv.session.conversation import Session as Session
from mlxkv.session.once import compress as compress
from mlxkv.session.once import decompress as decompress

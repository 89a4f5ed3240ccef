"""The registry of commands: every file of mlxkv/cli/ without a leading underscore registers one."""

from __future__ import annotations

from collections.abc import Callable

import typer

from mlxkv.registry import Registry

Command = Callable[..., None] | typer.Typer
commands: Registry[Command] = Registry("command", "mlxkv.cli", "mlxkv.commands")

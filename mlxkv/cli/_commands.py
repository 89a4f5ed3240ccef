"""The registry of commands: every file of mlxkv/cli/ without a leading underscore registers one."""

from __future__ import annotations

from collections.abc import Callable

import typer

from mlxkv.errors import InputError
from mlxkv.registry import Registry

Command = Callable[..., None] | typer.Typer


def _check_command(command: Command) -> None:
    if not callable(command):
        raise InputError(f"{command!r} is neither a function nor a Typer application")


commands: Registry[Command] = Registry("command", "mlxkv.cli", "mlxkv.commands", _check_command)

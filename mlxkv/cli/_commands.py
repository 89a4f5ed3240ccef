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


def passes_flags_on(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take flags that it does not know, in `typer.Context.args`, for a program that does."""
    command.context_settings = {"ignore_unknown_options": True, "allow_extra_args": True}  # type: ignore[attr-defined]
    return command


commands: Registry[Command] = Registry("command", "mlxkv.cli", "mlxkv.commands", _check_command)

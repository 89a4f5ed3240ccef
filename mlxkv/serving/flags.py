"""mlx-lm's server run with parts replaced: its command line is read by its own code, so that all its flags work."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import mlx.core as mx
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from mlx_lm import server

from mlxkv.errors import InputError, UnsupportedError, suggest

_MEMORY_SHARE = 8  # of the machine's memory, for caches that wait


def run_server(flags: Sequence[str], run: Callable[[str, int, Any], None]) -> None:
    """Let mlx-lm's server read its command line, and run something in place of its own server.

    Parameters
    ----------
    flags
        The command line.
    run
        Called with host, port and mlx-lm's provider of models, whose `cli_args` are what was read.

    Raises
    ------
    InputError
        For flags that mlx-lm does not have, or that it cannot read.
    """
    words = list(flags)

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *_: Any, **__: Any) -> Any:
            return super().parse_args(words)

        def error(self, message: str) -> NoReturn:
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            if not message.startswith("unrecognized") or not unknown.startswith("-"):
                raise InputError(f"mlx_lm.server: {message}", "mlx_lm.server --help explains its flags")
            known = [name for name in self._option_string_actions if name.startswith("--")]
            raise InputError(
                f"neither mlxkv serve nor mlx_lm.server has a flag {unknown[:80]}",
                suggest(unknown.partition("=")[0], known, "mlxkv serve --help lists ours, mlx_lm.server --help"),
            )

    names = {"argparse": SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})}
    with replaced(**names, run=run, scan_cache_dir=_hub_cache):
        server.main()  # type: ignore[no-untyped-call]


@contextmanager
def replaced(**names: Any) -> Iterator[None]:
    """Replace names in the module of mlx-lm's server for a while.

    Parameters
    ----------
    **names
        The new objects.

    Yields
    ------
    None
        While they are replaced.
    """
    before = {name: getattr(server, name) for name in names}
    try:
        for name, new in names.items():
            setattr(server, name, new)
        yield
    finally:
        for name, old in before.items():
            setattr(server, name, old)


def machine_share() -> int:
    """Return the bytes that caches in RAM may take where the command line does not say.

    Returns
    -------
    int
        An eighth of the machine's memory.
    """
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _MEMORY_SHARE


def check_ranks() -> None:
    """Check that one process serves the model.

    Raises
    ------
    UnsupportedError
        When mlx-lm was launched on several: each of them holds a part of every cache.
    """
    if (ranks := mx.distributed.init().size()) > 1:
        raise UnsupportedError(
            f"the model is served by {ranks} processes, each of which has a part of every cache",
            "mlx_lm.server serves it, without a store",
        )


def _hub_cache() -> Any:
    """Return the models that were downloaded, none where nothing ever was: mlx-lm answers no list of models then."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return SimpleNamespace(repos=())

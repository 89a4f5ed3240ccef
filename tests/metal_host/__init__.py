"""Runs the bodies of metal_kernels/ on any machine with a C++ compiler, and looks for mistakes while it does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import pytest

from metal_host.errors import HostError
from metal_host.runner import HostKernel, metal_kernel
from mlxkv.kernels import metal

__all__ = ["HostError", "installed", "metal_kernel"]


@contextmanager
def installed(edit: tuple[str, str, str] | None = None) -> Iterator[None]:
    """Inside, Metal counts as available and every kernel runs on the host. Skips the test where that is not Linux.

    `edit` is (body, old, new): a fault to plant in one body or in common. `old` must occur exactly once in it.
    """

    if sys.platform != "linux":
        pytest.skip("the host runner needs Linux")

    @cache
    def compiled(kernel: metal.Kernel) -> HostKernel:
        source, header = (
            _plant(metal.source(name), *edit) if edit is not None and edit[0] == name else metal.source(name)
            for name in (kernel.name, "common")
        )
        return metal_kernel(
            name=kernel.name,
            input_names=list(kernel.inputs),
            output_names=list(kernel.outputs),
            source=source,
            header=header,
            atomic_outputs=kernel.atomic,
        )

    with patch.object(metal, "available", lambda: True), patch.object(metal, "compiled", compiled):
        yield


def _plant(source: str, body: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {body}.metal, expected once")
    return source.replace(old, new)

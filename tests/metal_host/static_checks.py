"""Checks for code that the Metal compiler or MLX would refuse: nothing runs here. See static_tree.py for clang."""

from __future__ import annotations

import re
from functools import cache

from metal_host.signature import Specialisation
from metal_host.static_tree import StaticError, check_tree, without_comments
from mlxkv.kernels.metal import Kernel

MAX_BUFFERS = 30
MAX_THREADS = 1024

_BANNED = {
    r"\bdouble\b": "Metal has no double",
    r"(?<![\w.])(?:(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![\w.])": "a float literal without its f",
    r"\blong\s+long\b": "Metal has no long long",
    r"\bstd\s*::": "Metal has no std::",
    r"\b(new|delete)\b": "Metal has no new and delete",
    r"\b(try|catch|throw)\b": "Metal has no exceptions",
    r"\b(virtual|typeid|dynamic_cast)\b": "Metal has no virtual functions and no run-time types",
    r"\bgoto\b": "Metal has no goto",
    r"\bthread_local\b": "Metal has no thread_local",
    r"\b(asm|__asm|__asm__)\b": "Metal has no inline assembly",
    r"\bthreadgroup\s+[\w:]+(?:<\w+>)?\s+\w[^;*&(=]*(?<![<>!=])=(?!=)": "a threadgroup variable cannot be initialised",
    r"#\s*include\b": "MLX compiles one text: nothing to include",
}


def check(kernel: Specialisation) -> None:
    """Raises StaticError at the first mistake. A specialisation seen before costs a look-up."""
    if kernel.threads > MAX_THREADS:
        raise StaticError(f"{kernel.name}.metal:1: {kernel.threads} threads in a group, at most {MAX_THREADS}")
    _check_once(kernel)


@cache
def _check_once(kernel: Specialisation) -> None:
    _check_words("common.metal", kernel.header)
    _check_words(f"{kernel.name}.metal", kernel.body)
    if match := re.search(r"\bstatic\b", code := without_comments(kernel.body)):
        raise StaticError(f"{kernel.name}.metal:{_line(code, match.start())}: Metal has no static locals")
    _check_names(kernel)
    check_tree(kernel)


def check_declarations(modules: dict[str, list[Kernel]], bodies: set[str]) -> None:
    """Each body is declared once, by the module that its name begins with, and each declaration has a body.

    modules: the kernels declared in each module, by its name without the package. bodies: names of files without
    common and without suffix.
    """
    declared = [(module, kernel.name) for module, kernels in modules.items() for kernel in kernels]
    for module, name in declared:
        if name not in bodies:
            raise StaticError(f"{name}.metal:1: declared in {module}.py, but there is no such file")
        if name != module and not name.startswith(f"{module}_"):
            raise StaticError(f"{name}.metal:1: declared in {module}.py, which its name does not begin with")
    for name in sorted(bodies):
        owners = [module for module, other in declared if other == name]
        if len(owners) != 1:
            raise StaticError(f"{name}.metal:1: declared by {owners or 'no module'}, expected exactly one")


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


@cache
def _check_words(file: str, text: str) -> None:
    code = without_comments(text)
    if match := re.search(r"[^\x00-\x7f]", text):
        raise StaticError(f"{file}:{_line(text, match.start())}: not ASCII: {match[0]!a}")
    for pattern, message in _BANNED.items():
        if match := re.search(pattern, code):
            raise StaticError(f"{file}:{_line(text, match.start())}: {message}: {match[0]!a}")


def _check_names(kernel: Specialisation) -> None:
    code = without_comments(kernel.body)
    words: dict[str, int] = {}
    for match in re.finditer(r"[A-Za-z_]\w*", code):
        words.setdefault(match[0], match.start())
    arrays = [buffer.name for buffer in kernel.buffers if buffer.role in ("input", "output")]
    for name in [*arrays, *(name for name, _ in kernel.template)]:
        if name not in words:
            raise StaticError(f"{kernel.name}.metal:1: the call gives {name!r}, the body never names it")
    known = {buffer.name for buffer in kernel.buffers}
    for name, offset in words.items():
        if name.endswith(("_shape", "_strides", "_ndim")) and name not in known:
            raise StaticError(f"{kernel.name}.metal:{_line(code, offset)}: {name!r} is of no input that has it")
    if len(kernel.buffers) > MAX_BUFFERS:
        raise StaticError(f"{kernel.name}.metal:1: {len(kernel.buffers)} buffers, at most {MAX_BUFFERS}")

"""Compiles a translated kernel into an executable, kept by the hash of everything that goes into it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import time

from metal_host.errors import HostError

_MONTH = 30 * 24 * 3600.0
_CPP = Path(__file__).parent / "cpp"
_RUNTIME_FLAGS = ["-std=c++17", "-O2", "-fPIE", "-U_FORTIFY_SOURCE", "-D_XOPEN_SOURCE=700", "-D_DARWIN_C_SOURCE"]
# Thread sanitizing calls a hook before each access, the others call handlers: hooks.h has them all.
_UNDEFINED = "bounds,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow,bool"
_KERNEL_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIE",
    "-ffp-contract=off",
    "-fsigned-char",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-tree-vectorize",  # hooks know accesses of up to 16 bytes
    "-fno-tree-slp-vectorize",
    "-fsanitize=thread",
    f"-fsanitize={_UNDEFINED}",
    "-fno-sanitize-recover=all",
    "-Werror=uninitialized",
    "-Werror=return-type",
]


@cache
def compiler() -> str:
    """$CXX or the first C++ compiler on PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        found = name and shutil.which(name)
        if found:
            return found
    raise HostError("no C++ compiler: set CXX or install g++ or clang++")


@cache
def cache_dir() -> Path:
    """Where executables stay between runs, for a month."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(root) / "mlxkv" / "metal_host"
    path.mkdir(parents=True, exist_ok=True)
    for old in path.iterdir():
        with suppress(OSError):  # another process may be first
            if old.is_file() and old.stat().st_mtime < time() - _MONTH:
                old.unlink()
    return path


@cache
def _fingerprint() -> str:
    version = _run([compiler(), "--version"]).stdout
    headers = "".join(f"{path.name}\n{path.read_text()}" for path in sorted(_CPP.iterdir()))
    return "\n".join([version, platform.machine(), *_RUNTIME_FLAGS, *_KERNEL_FLAGS, headers])


def executable(source: str, fill: str = "pattern") -> Path:
    """The program for one translated kernel, with "pattern" or "zero" in locals that nobody has written.

    Raises HostError with the compiler's first error, at the body's line.
    """
    flags = [*_KERNEL_FLAGS, f"-ftrivial-auto-var-init={fill}"]
    key = hashlib.sha256(f"{_fingerprint()}\n{fill}\n{source}".encode()).hexdigest()[:32]
    path = cache_dir() / key
    if not path.exists():
        _build(source, path, flags)
    return path


def _build(source: str, path: Path, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        text, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel"
        text.write_text(source)
        compiled = _run([compiler(), *flags, f"-I{_CPP}", "-c", str(text), "-o", f"{built}.o"])
        if compiled.returncode != 0:
            raise HostError(first_error(compiled.stderr))
        linked = _run([compiler(), "-pie", f"{built}.o", str(_runtime()), "-lm", "-o", str(built)])
        if linked.returncode != 0:
            raise HostError(f"the kernel does not link: {linked.stderr}")
        built.rename(path)


def first_error(messages: str) -> str:
    """The first error of the compiler, placed in a .metal file where it or what led to it names one."""
    error = re.search(r"^.*(?:error): (.*)$", messages, re.MULTILINE)
    place = re.search(r"(\w+\.metal):(\d+)", messages[error.start() :] if error else messages)
    place = place or re.search(r"(\w+\.metal):(\d+)", messages)
    text = error.group(1) if error else messages.strip()
    return f"{place.group(1)}:{place.group(2)}: {text}" if place else text


@cache
def _runtime() -> Path:
    key = hashlib.sha256(_fingerprint().encode()).hexdigest()[:32]
    path = cache_dir() / f"{key}.o"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            built = Path(folder) / "runtime.o"
            done = _run([compiler(), *_RUNTIME_FLAGS, "-c", str(_CPP / "runtime.cpp"), "-o", str(built)])
            if done.returncode != 0:
                raise HostError(f"the runtime does not compile: {done.stderr}")
            built.rename(path)
    return path


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})

"""Models out of PyPI wheels: each is converted once, into a folder that other processes find complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mlxkv.errors import ModelNotFoundError

LAST = "config.json"  # which every conversion writes last: it marks a folder complete


def cache_home() -> Path:
    """Return the folder for converted models.

    Returns
    -------
    Path
        `$MLXKV_HOME`, or `mlxkv` in the user's cache folder.
    """
    home = os.environ.get("MLXKV_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlxkv"


def converted(name: str) -> Path | None:
    """Return the directory of a model that is converted already.

    Parameters
    ----------
    name
        The model's.

    Returns
    -------
    Path or None
        An mlx-lm model directory; None where there is none yet.
    """
    folder = cache_home() / name
    return folder if (folder / LAST).is_file() else None


def convert_once(name: str, needs: str, convert: Callable[[Path], None]) -> Path:
    """Convert a model, unless it was before or another process does it meanwhile.

    Parameters
    ----------
    name
        The model's, which its folder gets.
    needs
        The space that the conversion takes, such as "270 MB".
    convert
        Fills a folder, `LAST` last.

    Returns
    -------
    Path
        An mlx-lm model directory.

    Raises
    ------
    ModelNotFoundError
        When the cache folder cannot be written.
    """
    target = cache_home() / name
    # As mlx-lm does: Transformers, which writes the tokenizer, would say that it misses PyTorch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _turn(target.parent) as alone:
            if converted(name):
                return target
            if alone:  # what a killed process left
                for litter in target.parent.glob(f".{name}-*"):
                    shutil.rmtree(litter, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
            try:
                convert(work)
                _flush(work)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if not converted(name):
            raise ModelNotFoundError(
                f"cannot convert {name} into {target.parent}: {error.strerror or error};"
                f" it needs a writable folder with {needs} free, set MLXKV_HOME to one"
            ) from error
    return target


@contextmanager
def _turn(folder: Path) -> Iterator[bool]:
    """Wait while another process converts into this folder; yield whether none can, as far as its file system has locks."""
    opened = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    alone = False
    try:
        with suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
            alone = True
        yield alone
    finally:
        os.close(opened)


def _flush(folder: Path) -> None:
    """Wait until a folder's files would survive a power cut, which its new name may."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def wheel_file(package: str, ending: str, name: str, install: str) -> Path:
    """Return a file of an installed wheel.

    Parameters
    ----------
    package
        The wheel's name.
    ending
        What the file's name ends with.
    name
        The model that is in it.
    install
        The command that installs it.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ModelNotFoundError
        When the wheel is not installed or holds no such file.
    """
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ModelNotFoundError(f"{name} comes from the {package} wheel, which is not installed: {install}") from None
    for file in files:
        if file.name.endswith(ending):
            return Path(str(file.locate()))
    raise ModelNotFoundError(f"the installed {package} holds no {ending} file; reinstall it: {install}")

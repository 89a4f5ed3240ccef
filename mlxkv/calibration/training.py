"""Training in a process of its own: it ends at once when it is told to, and can stay out of the way of a server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mlxkv.codec.artifacts import CalibrationArtifacts
from mlxkv.codec.calibrate import calibrate, learn, method_to_calibrate
from mlxkv.codec.methods.base import CodecConfig, codec_methods
from mlxkv.codec.methods.kvtc_rd import KVTCRDConfig, QuickKVTCRD
from mlxkv.codec.samples import Progress, Samples
from mlxkv.errors import InputError, MlxkvError

LEARNT = "learnt"  # the folder of the artifacts, among the files that they were learnt from
_MOST_THREADS = 4  # of a gentle one
_ROOT = Path(__file__).parents[2]
# Last, so that nothing there is taken for a part of Python; `-P` keeps the current folder out.
_CODE = f"import sys; sys.path.append({str(_ROOT)!r}); from mlxkv.calibration.training import main; main()"
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def train(files: Sequence[Path], config: CodecConfig, progress: Progress = lambda step: None) -> CalibrationArtifacts:
    """Learn artifacts from finished stretches, in this process.

    Parameters
    ----------
    files
        Dumps with their sensitivity; at least one.
    config
        Settings of a codec method.
    progress
        Called with the name of each step as it starts.

    Returns
    -------
    CalibrationArtifacts
        The artifacts.

    Raises
    ------
    InputError
        For too few tokens to learn from.
    MismatchError
        For dumps of different models.
    """
    if not isinstance(config, KVTCRDConfig):
        return calibrate(files, config, progress)
    return learn(QuickKVTCRD(), Samples(files, config.sinks, config.samples_per_file, progress), config)


def has_own_process(config: CodecConfig) -> bool:
    """Return whether another process would find the method of settings: one of a plugin may be known to this one alone.

    Parameters
    ----------
    config
        Settings of a codec method.

    Returns
    -------
    bool
        True for the methods of this package.
    """
    return type(config).__module__.startswith("mlxkv.")


class Training:
    """A process that learns artifacts from the first dumps of a folder. It ends with this one, however this one ends.

    Parameters
    ----------
    folder
        Folder of dumps that are named by number, such as "00000.npz"; the artifacts are written beside them.
    count
        How many of them to learn from.
    config
        Settings of a codec method of this package.
    gentle
        Whether to use few threads of the CPU, at the lowest priority, and no GPU.

    Raises
    ------
    InputError
        When no process can be started.
    """

    def __init__(self, folder: Path, count: int, config: CodecConfig, *, gentle: bool = False) -> None:
        self.learnt = folder / LEARNT
        shutil.rmtree(self.learnt, ignore_errors=True)
        name = next(name for name, method in codec_methods.items() if method.config_class is type(config))
        job = {"count": count, "method": name, "config": config.to_dict(), "gentle": gentle}
        threads = str(max(1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # `stop` closes it
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE, str(folder), json.dumps(job)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**os.environ, **(dict.fromkeys(_THREADS, threads) if gentle else {})},
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise InputError(f"cannot start a process to learn in: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def steps(self) -> Iterator[str]:
        """Yield the name of each step as it starts, until the process ends; a gentle one tells none.

        Yields
        ------
        str
            Such as "tables of k".
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.rstrip("\n")
        self._process.wait()

    def ended(self) -> bool:
        """Return whether the process has ended, in whatever way.

        Returns
        -------
        bool
            False while it runs.
        """
        return self._process.poll() is not None

    def result(self) -> CalibrationArtifacts:
        """Wait for the process, and return what it learnt.

        Returns
        -------
        CalibrationArtifacts
            The artifacts, read and verified.

        Raises
        ------
        InputError
            When it failed, with its reason; and when it was stopped.
        """
        code = self._process.wait()
        if code == 0:
            return CalibrationArtifacts.from_dir(self.learnt)
        raise InputError(self._reason(code))

    def _reason(self, code: int) -> str:
        """Return why the process failed, by the last line that it said."""
        if code < 0:
            return f"learning was ended by {signal.Signals(-code).name}"
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4_096))
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return (lines[-1] if lines else f"learning ended with code {code}")[:500]

    def stop(self) -> None:
        """End the process, if it has not ended; what it has not finished is lost. Does nothing the second time."""
        self._process.kill()  # which an ended one does not notice
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def main() -> None:
    """Learn what the command line of this process says: a folder, and a JSON object of what `Training` was given."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    if job["gentle"]:
        _be_gentle()
    try:
        _run(folder, job)
    except MlxkvError as error:
        sys.exit(error.message)


def _run(folder: Path, job: dict[str, Any]) -> None:
    """Learn, and save what was learnt."""

    def show(step: str) -> None:
        if not job["gentle"]:
            sys.stdout.write(f"{step}\n")
            sys.stdout.flush()

    config = codec_methods.get(job["method"]).config_class.from_dict(job["config"])
    method_to_calibrate(config)
    files = [folder / f"{index:05d}.npz" for index in range(job["count"])]
    train(files, config, show).save(folder / LEARNT)


def _be_gentle() -> None:
    """Give way to everything else that runs on this machine."""
    import mlx.core as mx

    os.nice(19)
    mx.set_default_device(mx.cpu)  # the GPU is the server's


def _end_with_parent() -> None:
    """End when the pipe to the parent closes, as it does even where that is killed."""
    with suppress(OSError):
        os.read(0, 1)
    os._exit(1)

"""`metal_kernel` with the arguments of `mx.fast.metal_kernel`, run on the host."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metal_host import build, static_checks
from metal_host.errors import HostError
from metal_host.signature import Buffer, Specialisation, TemplateValue, buffers
from metal_host.translate import cpp, declares_array

TIMEOUT = 60  # seconds of a run
_INPUT, _OUTPUT, _FILLED_OUTPUT = range(3)


@dataclass(frozen=True)
class HostKernel:
    """A kernel that runs on the host, called with the keywords of MLX's kernels."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    atomic_outputs: bool

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        """The outputs. Raises ValueError as MLX does on wrong counts, HostError for what the runner finds."""
        for label, found, names in (
            ("inputs", inputs, self.input_names),
            ("output_shapes", output_shapes, self.output_names),
            ("output_dtypes", output_dtypes, self.output_names),
        ):
            if len(found) != len(names):
                raise ValueError(f"expected `{label}` to have size {len(names)} but got size {len(found)}")
        arrays = {
            name: value if isinstance(value, mx.array) else mx.array(value)
            for name, value in zip(self.input_names, inputs)
        }
        group = _check_sizes(grid, threadgroup)
        outputs = dict(zip(self.output_names, output_dtypes))
        specialisation = Specialisation(
            self.name,
            self.header,
            self.source,
            tuple(template or ()),
            buffers(self.source, arrays, outputs, atomic=self.atomic_outputs),
            prod(group),
        )
        static_checks.check(specialisation)
        shapes = dict(zip(self.output_names, output_shapes))
        call = [struct.pack("8I", *grid, *group, len(specialisation.buffers), TIMEOUT)]
        call += [_pack_buffer(b, arrays, shapes, outputs, init_value) for b in specialisation.buffers]
        fills = ("pattern", "zero") if declares_array(specialisation) else ("pattern",)
        programs = [build.executable(cpp(specialisation), fill) for fill in fills]
        stored, *others = [_run(self.name, program, b"".join(call)) for program in programs]
        if others and others[0] != stored:
            raise HostError(f"{self.name}.metal: the result depends on elements of a thread's array that nobody wrote")
        return _unpack(stored, [(shapes[name], dtype) for name, dtype in outputs.items()])


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
) -> HostKernel:
    """Return a kernel, as mx.fast.metal_kernel does. `source` is reported as `<name>.metal`, `header` as common.metal."""
    if not output_names:
        raise ValueError("must specify at least one output")
    if not ensure_row_contiguous:
        raise HostError("the host runner only has row-contiguous inputs")
    return HostKernel(name, tuple(input_names), tuple(output_names), source, header, atomic_outputs)


def _check_sizes(grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> tuple[int, ...]:
    if len(grid) != 3 or min(grid) < 1 or len(threadgroup) != 3 or min(threadgroup) < 1:
        raise HostError(f"grid {grid} and threadgroup {threadgroup} need three sizes of at least 1")
    if prod(threadgroup) > 1024:
        raise HostError(f"threadgroup {threadgroup} has {prod(threadgroup)} threads, at most 1024")
    return tuple(min(pair) for pair in zip(grid, threadgroup))


def _bytes(array: mx.array) -> bytes:
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16) if array.ndim else array.reshape(1).view(mx.uint16)).tobytes()
    return np.array(array).tobytes()


def _pack_buffer(
    buffer: Buffer,
    arrays: dict[str, mx.array],
    shapes: dict[str, Sequence[int]],
    outputs: dict[str, mx.Dtype],
    init_value: float | None,
) -> bytes:
    """Header and contents, as main.h reads them."""
    role, float32 = _INPUT, 0
    if buffer.role == "output":
        dtype = outputs[buffer.name]
        role, size, float32 = _OUTPUT, dtype.size * prod(shapes[buffer.name]), dtype == mx.float32
        granule, contents = dtype.size, b""
        if init_value is not None:
            role, contents = _FILLED_OUTPUT, _bytes(mx.full(shapes[buffer.name], init_value, dtype=dtype))
    elif buffer.role == "input":
        contents, granule = _bytes(arrays[buffer.name]), arrays[buffer.name].dtype.size
        size = len(contents)
    else:
        contents, granule = _shape_info(buffer, arrays), 8 if buffer.role == "strides" else 4
        size = len(contents)
    return struct.pack("64sQ4I", buffer.name.encode()[:63], size, granule, role, float32, 0) + contents


def _shape_info(buffer: Buffer, arrays: dict[str, mx.array]) -> bytes:
    shape = arrays[buffer.name.removesuffix(f"_{buffer.role}")].shape
    if buffer.role == "ndim":
        return struct.pack("i", len(shape))
    if buffer.role == "shape":
        return struct.pack(f"{len(shape)}i", *shape)
    return struct.pack(f"{len(shape)}q", *(prod(shape[axis + 1 :]) for axis in range(len(shape))))


def _unpack(stored: bytes, outputs: list[tuple[Sequence[int], mx.Dtype]]) -> list[mx.array]:
    found, at = [], 0
    for shape, dtype in outputs:
        size = prod(shape) * dtype.size
        raw = mx.array(np.frombuffer(stored[at : at + size], dtype=np.uint8))
        found.append((raw.view(dtype) if size else mx.zeros((0,), dtype)).reshape(tuple(shape)))
        at += size
    return found


def _run(name: str, program: Path, call: bytes) -> bytes:
    try:
        done = subprocess.run([program], input=call, capture_output=True, timeout=TIMEOUT + 10, check=False)
    except subprocess.TimeoutExpired as error:
        raise HostError(f"{name}.metal: still running after {TIMEOUT} seconds") from error
    if done.returncode != 0:
        raise HostError(_explain(name, program, done))
    return done.stdout


def _explain(name: str, program: Path, done: subprocess.CompletedProcess[bytes]) -> str:
    text = done.stderr.decode(errors="replace").strip().splitlines()
    message = text[-1] if text else f"the process ended with status {done.returncode}"
    if match := re.match(r"LINE (.*?):(\d+): (.*)", message):
        file, line, rest = match.groups()
        return f"{name}.metal: {rest}" if file == "runner" else f"{file}:{line}: {rest}"
    if match := re.match(r"PC (0x[0-9a-f]+): (.*)", message):
        return f"{_place(name, program, match.group(1))}: {match.group(2)}"
    return f"{name}.metal: {message}"


def _place(name: str, program: Path, address: str) -> str:
    """The innermost line of a .metal file at an address, and the line of the body that led there."""
    tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
    if tool is None:
        return f"{name}.metal"
    done = subprocess.run([tool, "-i", "-e", program, address], capture_output=True, text=True, check=False)
    frames = [f"{file}:{line}" for file, line in re.findall(r"(\w+\.metal):(\d+)", done.stdout)]
    if not frames:
        return f"{name}.metal"
    outer = f" (from {frames[-1]})" if frames[-1] != frames[0] else ""
    return frames[0] + outer

"""The signature that MLX writes around a kernel's body, as data: mlx/backend/common/metal_kernel.cpp."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

CONSTANT_BELOW = 8  # an input with fewer elements comes in the `constant` address space

# get_type_string of MLX.
TYPE_NAMES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
}

# MLX passes those that the body names, as a substring, in this order.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

TemplateValue = int | bool | mx.Dtype


@dataclass(frozen=True)
class Buffer:
    """One buffer parameter. space: device or constant. role: input, shape, strides, ndim or output."""

    name: str
    type: str  # as MLX writes it, with atomic<> for an atomic output
    space: str
    role: str
    reference: bool  # `&` instead of `*`: 0-d inputs and ndim

    @property
    def const(self) -> bool:
        return self.role != "output"

    @property
    def declaration(self) -> str:
        """The parameter without its [[buffer(n)]]: `const device float* x`."""
        const = "const " if self.const else ""
        return f"{const}{self.space} {self.type}{'&' if self.reference else '*'} {self.name}"


@dataclass(frozen=True)
class Specialisation:
    """A kernel as the Metal compiler would see it for one combination of types, ranks and template values."""

    name: str  # the body is <name>.metal
    header: str  # common.metal
    body: str
    template: tuple[tuple[str, TemplateValue], ...]
    buffers: tuple[Buffer, ...]  # in the order of their indices
    threads: int = field(default=1, compare=False)  # of the threadgroup in the call that made it

    @property
    def attributes(self) -> dict[str, str]:
        """Name -> type of the thread attributes that the body names."""
        return {name: kind for name, kind in ATTRIBUTES.items() if name in self.body}

    @property
    def parameters(self) -> tuple[str, ...]:
        """All declarations, with address spaces, without attributes in brackets."""
        return (
            *(buffer.declaration for buffer in self.buffers),
            *(f"{kind} {name}" for name, kind in self.attributes.items()),
        )

    @property
    def template_parameters(self) -> str:
        """`typename T, int BITS`, empty without a template."""
        return ", ".join(f"{_template_kind(value)} {name}" for name, value in self.template)

    @property
    def template_arguments(self) -> str:
        """`float, 4`, empty without a template."""
        return ", ".join(_template_text(value) for _, value in self.template)


def _template_kind(value: TemplateValue) -> str:
    if isinstance(value, mx.Dtype):
        return "typename"
    return "bool" if isinstance(value, bool) else "int"


def _template_text(value: TemplateValue) -> str:
    return TYPE_NAMES[value] if isinstance(value, mx.Dtype) else str(int(value))


def buffers(
    body: str, inputs: dict[str, mx.array], outputs: dict[str, mx.Dtype], *, atomic: bool
) -> tuple[Buffer, ...]:
    """The buffer parameters MLX generates, shape, strides and ndim only where the body names them."""
    found = []
    for name, array in inputs.items():
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        found.append(Buffer(name, TYPE_NAMES[array.dtype], space, "input", array.ndim == 0))
        if array.ndim == 0:
            continue
        for role, kind in (("shape", "int"), ("strides", "int64_t"), ("ndim", "int")):
            if f"{name}_{role}" in body:
                found.append(Buffer(f"{name}_{role}", kind, "constant", role, role == "ndim"))
    for name, dtype in outputs.items():
        kind = TYPE_NAMES[dtype]
        found.append(Buffer(name, f"atomic<{kind}>" if atomic else kind, "device", "output", False))
    return tuple(found)

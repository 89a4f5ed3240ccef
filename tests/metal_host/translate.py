"""From a specialisation to C++: MLX's signature without address spaces, the body with its line numbers."""

from __future__ import annotations

import re

from metal_host.errors import HostError
from metal_host.signature import Buffer, Specialisation

# Each attribute from the runtime's Place.
_ATTRIBUTE_VALUES = {
    "dispatch_quadgroups_per_threadgroup": "host::groups_of(4, place.dispatched_threads)",
    "dispatch_simdgroups_per_threadgroup": "host::groups_of(32, place.dispatched_threads)",
    "dispatch_threads_per_threadgroup": "host::triple(place.dispatched_threads)",
    "grid_origin": "uint3(0)",
    "grid_size": "host::triple(place.grid)",
    "quadgroup_index_in_threadgroup": "place.index / 4",
    "quadgroups_per_threadgroup": "host::groups_of(4, place.threads)",
    "simdgroup_index_in_threadgroup": "place.index / 32",
    "simdgroups_per_threadgroup": "host::groups_of(32, place.threads)",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "place.index % 4",
    "thread_index_in_simdgroup": "place.index % 32",
    "thread_index_in_threadgroup": "place.index",
    "thread_position_in_grid": "host::triple(place.position_in_grid)",
    "thread_position_in_threadgroup": "host::triple(place.position_in_threadgroup)",
    "threadgroup_position_in_grid": "host::triple(place.threadgroup_position)",
    "threadgroups_per_grid": "host::triple(place.threadgroups)",
    "threads_per_grid": "host::triple(place.grid)",
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": "host::triple(place.threads)",
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_WORD = re.compile(r"\bthreadgroup\b")
_TYPE = r"(?:(?:const|unsigned|volatile)\s+)*(?:\w+::)*\w+(?:\s*<[^;<>]*>)?"
# A pointer, a reference, a reference to an array; otherwise the word has to start a variable.
_POINTER = re.compile(rf"threadgroup\s*(?:[*&]|{_TYPE}\s*(?:const\s*)?[*&(])")
_VARIABLE = re.compile(rf"threadgroup\s+({_TYPE})\s+(\w+\s*(?:[\[,][^;]*)?);")
_LOCAL_ARRAY = re.compile(rf"^(?!\s*(?:threadgroup|typedef|return)\b)\s*{_TYPE}\s+\w+\s*\[", re.MULTILINE)
_DECLARATOR = re.compile(r"(\w+)\s*((?:\[.*\])?)\s*$", re.DOTALL)


def cpp(specialisation: Specialisation) -> str:
    """A C++ file that defines host_kernel for the runtime.

    Raises HostError for text that is not ASCII or a threadgroup variable that the translation does not understand.
    """
    for name, text in (("common", specialisation.header), (specialisation.name, specialisation.body)):
        _require_ascii(name, text)
    template = specialisation.template_parameters
    lines = [
        '#include "metal.h"',
        '#line 1 "common.metal"',
        _require_no_variables(specialisation.header),
        f"template <{template}>" if template else "inline",
        "void host_body(",
        ",\n".join(_parameters(specialisation)) + ") {",
        f'#line 1 "{specialisation.name}.metal"',
        _share(specialisation.name, specialisation.body),
        "}",
        '#line 1 "host_kernel"',
        '__attribute__((no_sanitize("thread"))) void host_kernel(',
        "    void* const* buffers, const host::Place& place) {",
        f"  host_body{f'<{specialisation.template_arguments}>' if template else ''}(",
        "      " + ",\n      ".join(_arguments(specialisation)) + ");",
        "}",
    ]
    return "\n".join(lines) + "\n"


def declares_array(specialisation: Specialisation) -> bool:
    """Return whether a thread may have arrays of its own, whose elements no compiler warning can follow."""
    code = "\n".join(_without_comments(text) for text in (specialisation.header, specialisation.body))
    return _LOCAL_ARRAY.search(code) is not None


def _require_ascii(name: str, text: str) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            raise HostError(f"{name}.metal:{number}: only ASCII reaches the Metal compiler")


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _require_no_variables(header: str) -> str:
    if _share("common", header) != _without_comments(header):
        raise HostError("common.metal: a threadgroup variable outside a kernel")
    return header


def _type(buffer: Buffer) -> str:
    return f"{'const ' if buffer.const else ''}{buffer.type}"


def _parameters(specialisation: Specialisation) -> list[str]:
    buffers = [f"  {_type(b)}{'&' if b.reference else '*'} {b.name}" for b in specialisation.buffers]
    return buffers + [f"  {kind} {name}" for name, kind in specialisation.attributes.items()]


def _arguments(specialisation: Specialisation) -> list[str]:
    buffers = [
        f"{'*' if b.reference else ''}static_cast<{_type(b)}*>(buffers[{i}])"
        for i, b in enumerate(specialisation.buffers)
    ]
    return buffers + [_ATTRIBUTE_VALUES[name] for name in specialisation.attributes]


def _share(name: str, body: str) -> str:
    """Turn `threadgroup T a[N], b;` into references to memory of the runtime, on the same line."""
    code = _without_comments(body)
    text, end, count = [], 0, 0
    for word in _WORD.finditer(code):
        if _POINTER.match(code, word.start()):
            continue
        variable = _VARIABLE.match(code, word.start())
        if variable is None:
            line = code.count("\n", 0, word.start()) + 1
            raise HostError(f"{name}.metal:{line}: cannot translate this use of `threadgroup`")
        text.append(code[end : word.start()])
        for declarator in re.split(r",(?![^\[]*\])", variable.group(2)):
            text.append(_reference(variable.group(1), declarator, count) + " ")
            count += 1
        text.append("\n" * variable.group().count("\n"))
        end = variable.end()
    return "".join(text) + code[end:]


def _reference(kind: str, declarator: str, index: int) -> str:
    match = _DECLARATOR.match(declarator.strip())
    if match is None:
        raise HostError(f"cannot translate the threadgroup variable {declarator.strip()!r}")
    variable, sizes = match.group(1), match.group(2).replace("\n", " ")
    shared = f'host::shared<host_{variable}_type>({index}, "{variable}", unit_size<{kind}>)'
    return f"typedef {kind} host_{variable}_type{sizes}; host_{variable}_type& {variable} = {shared};"

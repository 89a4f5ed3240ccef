"""A kernel as clang's tree: what the Metal compiler would refuse that plain text does not show.

The body is parsed as MLX would hand it to Metal, twice: as the template, for what clang says of it, and with the
template's values put in, because libclang shows no trees of instances. The address spaces are clang's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from clang import cindex
from clang.cindex import Cursor, CursorKind, Diagnostic, SourceLocation, StorageClass, Type, TypeKind

from metal_host.errors import HostError
from metal_host.signature import TYPE_NAMES, Specialisation

MAX_THREADGROUP_BYTES = 32768

_HERE = Path(__file__).parent
_COMMON = "common.metal"
_WITH_VALUES = "kernel_with_values"
_FLAGS = [
    "-std=c++14",
    "--target=arm64-apple-macosx",
    "-pedantic-errors",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-unknown-pragmas",
    "-Wimplicit-float-conversion",
    *(f"-Werror={name}" for name in ("array-bounds", "return-type", "shift-count-overflow", "uninitialized")),
]
# Comments, and literals so that their slashes are not taken for comments.
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'", re.DOTALL)
_FUNCTIONS = {CursorKind.FUNCTION_DECL, CursorKind.FUNCTION_TEMPLATE, CursorKind.CXX_METHOD, CursorKind.CONSTRUCTOR}
_VARIABLES = {CursorKind.VAR_DECL, CursorKind.PARM_DECL, CursorKind.FIELD_DECL}
_REFERENCES = {CursorKind.DECL_REF_EXPR, CursorKind.MEMBER_REF_EXPR}
_CASTS = {CursorKind.CSTYLE_CAST_EXPR, CursorKind.CXX_FUNCTIONAL_CAST_EXPR, CursorKind.CXX_STATIC_CAST_EXPR}
_POINTERS = {TypeKind.POINTER, TypeKind.LVALUEREFERENCE, TypeKind.RVALUEREFERENCE}
_ARRAYS = {TypeKind.CONSTANTARRAY, TypeKind.INCOMPLETEARRAY, TypeKind.DEPENDENTSIZEDARRAY}
_CODE = {TypeKind.FUNCTIONPROTO, TypeKind.FUNCTIONNOPROTO}
_THREAD, _CONSTANT, _THREADGROUP = 0, 2, 3  # as in clang_prelude.h


class StaticError(HostError):
    """A kernel that the Metal compiler would refuse; the message is `<name>.metal:<line>: what`."""


class _Node(NamedTuple):
    cursor: Cursor
    parent: Cursor
    function: Cursor | None  # the innermost around it


def without_comments(text: str) -> str:
    """The same lines and columns, comments blank."""
    return _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]) if match[0][0] == "/" else match[0], text)


def check_tree(kernel: Specialisation) -> None:
    """Raises StaticError at what clang finds wrong, then at what these rules find in its tree."""
    unit = _Unit(kernel)
    rules: tuple[Callable[[_Unit, _Node], None], ...] = (
        _no_lambda,
        _spaces_are_written,
        _casts_keep_the_space,
        _storage_is_metals,
        _bfloat_is_made_by_name,
    )
    threadgroup_bytes = 0
    calls: dict[tuple, set[tuple]] = {}
    names: dict[tuple, str] = {}
    for node in unit.nodes():
        for rule in rules:
            rule(unit, node)
        cursor = node.cursor
        if cursor.kind == CursorKind.VAR_DECL and cursor.type.get_address_space() == _THREADGROUP:
            threadgroup_bytes += cursor.type.get_size()
            if threadgroup_bytes > MAX_THREADGROUP_BYTES:
                unit.fail(cursor, f"{threadgroup_bytes} bytes of threadgroup memory, at most {MAX_THREADGROUP_BYTES}")
        if cursor.kind in _FUNCTIONS:
            names[_place(cursor)] = cursor.spelling
        if node.function is not None:
            for target in _targets(cursor):
                calls.setdefault(_place(node.function), set()).add(target)
    for place, name in names.items():
        _no_recursion(place, name, calls, names)


class _Unit:
    """A parsed specialisation: clang has found nothing wrong with it, or the constructor raises."""

    def __init__(self, kernel: Specialisation) -> None:
        self.body = f"{kernel.name}.metal"
        self.texts = {_COMMON: kernel.header, self.body: _static(without_comments(kernel.body))}
        main = _HERE / "main.cpp"
        files = {main: _main(kernel, self.body), **{_HERE / name: text for name, text in self.texts.items()}}
        self.unit = cindex.Index.create().parse(
            str(main), args=_FLAGS, unsaved_files=[(str(path), text) for path, text in files.items()]
        )
        for diagnostic in self.unit.diagnostics:
            narrowing = (
                diagnostic.option == "-Wimplicit-float-conversion"
                and "__bf16" in diagnostic.spelling.rpartition(" to ")[2]
            )
            if diagnostic.severity >= Diagnostic.Error or narrowing:
                raise StaticError(f"{self._where(diagnostic)}: {_plain(diagnostic.spelling)}")

    def _where(self, diagnostic: Diagnostic) -> str:
        """The first place in our files that a diagnostic or its notes name; an error at the end is past the body."""
        for each in (diagnostic, *diagnostic.children):
            if (name := _file(each.location)) in self.texts:
                return f"{name}:{each.location.line}"
        return f"{self.body}:{self.texts[self.body].rstrip().count(chr(10)) + 1}"

    def fail(self, cursor: Cursor, message: str) -> None:
        raise StaticError(f"{_file(cursor.location)}:{cursor.location.line}: {_plain(message)}")

    def before_name(self, cursor: Cursor) -> str:
        """The text of a declaration up to the name that it declares, a macro of no text before it included."""
        text = self.texts[_file(cursor.location)]
        start = re.search(r"[^;{}(),<>]*\Z", text[: cursor.extent.start.offset])
        return (start[0] if start else "") + text[cursor.extent.start.offset : cursor.location.offset]

    def nodes(self) -> Iterator[_Node]:
        """Everything in our two files, the body once, with the template's values."""
        for cursor in self.unit.cursor.get_children():
            if cursor.spelling == _WITH_VALUES or _file(cursor.location) == _COMMON:
                yield from self._below(cursor, self.unit.cursor, None)

    def _below(self, cursor: Cursor, parent: Cursor, function: Cursor | None) -> Iterator[_Node]:
        if _file(cursor.location) in self.texts:
            yield _Node(cursor, parent, function)
        inside = cursor if cursor.kind in _FUNCTIONS else function
        for child in cursor.get_children():
            yield from self._below(child, cursor, inside)


def _static(code: str) -> str:
    """A local variable cannot have an address space in clang, a static one can; one of a class has no constructor
    for it, but takes an empty list."""
    code = re.sub(r"(^|[;{}])(\s*)threadgroup\b", r"\1\2static threadgroup", code)
    return re.sub(r"(static threadgroup\s+(?:metal::)?atomic\b[^;*&]*)(?=;)", r"\1 = {}", code)


def _main(kernel: Specialisation, body: str) -> str:
    """The text that clang parses: lines of the files that it includes stay what they are."""
    parameters = ", ".join(kernel.parameters)
    parts = ['#include "clang_prelude.h"', f'#include "{_COMMON}"']
    if kernel.template:
        name = f"kernel_template<{kernel.template_arguments}>"
        parts += [f"template <{kernel.template_parameters}>", f"void kernel_template({parameters}) {{"]
        parts += [f'#include "{body}"', "}", f"template decltype({name}) {name};"]
    values = [
        f"using {name} = {TYPE_NAMES[value]};"
        if isinstance(value, mx.Dtype)
        else f"constexpr {type(value).__name__} {name} = {int(value)};"
        for name, value in kernel.template
    ]
    return "\n".join([*parts, f"void {_WITH_VALUES}({parameters}) {{", *values, f'#include "{body}"', "}\n"])


def _no_recursion(place: tuple, name: str, calls: dict[tuple, set[tuple]], names: dict[tuple, str]) -> None:
    """A call in a template that clang has not resolved counts for every function of that name."""
    seen: set[tuple] = set()
    todo = [place]
    while todo:
        for target in calls.get(todo.pop(), set()):
            found = [key for key, other in names.items() if key == target or target == (other,)]
            if place in found:
                raise StaticError(f"{place[0]}:{place[1]}: {name!r} calls itself; Metal has no recursion")
            todo += [key for key in found if key not in seen]
            seen.update(found)


def _targets(cursor: Cursor) -> list[tuple]:
    """The functions an expression names: by place, or by spelling where a template has yet to choose."""
    if cursor.kind == CursorKind.OVERLOADED_DECL_REF:
        return [(cursor.spelling,)]
    if cursor.kind not in _REFERENCES or (found := cursor.referenced) is None or found.kind not in _FUNCTIONS:
        return []
    return [_place(cindex.conf.lib.clang_getSpecializedCursorTemplate(found) or found)]


def _no_lambda(unit: _Unit, node: _Node) -> None:
    if node.cursor.kind == CursorKind.LAMBDA_EXPR:
        unit.fail(node.cursor, "Metal has no lambdas")


def _spaces_are_written(unit: _Unit, node: _Node) -> None:
    """Metal: "pointer type must have explicit address space qualifier"; only `auto p` and templates do without."""
    cursor = node.cursor
    if cursor.kind not in _VARIABLES or _kind(cursor.type) == TypeKind.AUTO:
        return
    if (pointee := _pointee(cursor.type)) is None:
        return
    if _kind(pointee) in _CODE:
        unit.fail(cursor, f"Metal has no function pointers: {cursor.spelling!r}")
    if pointee.get_address_space() == _THREAD and not re.search(r"\bthread\b", unit.before_name(cursor)):
        unit.fail(cursor, f"{cursor.spelling!r} points or refers to no named address space: {cursor.type.spelling!r}")


def _casts_keep_the_space(unit: _Unit, node: _Node) -> None:
    if node.cursor.kind not in _CASTS:
        return
    to = _pointee(node.cursor.type)
    source = [_pointee(child.type) for child in node.cursor.get_children() if child.kind.is_expression()]
    if to and source and source[-1] and to.get_address_space() != source[-1].get_address_space():
        unit.fail(node.cursor, f"a cast to another address space: {node.cursor.type.spelling!r}")


def _storage_is_metals(unit: _Unit, node: _Node) -> None:
    cursor = node.cursor
    if cursor.kind != CursorKind.VAR_DECL:
        return
    space = cursor.type.get_address_space()
    if node.function is None:
        if space != _CONSTANT:
            unit.fail(cursor, f"a variable outside functions must be constant: {cursor.spelling!r}")
        return
    if space == _THREADGROUP:
        if node.function.spelling != _WITH_VALUES:
            unit.fail(cursor, f"threadgroup variables stand in the kernel itself: {cursor.spelling!r}")
    elif cursor.storage_class == StorageClass.STATIC and node.function.spelling != _WITH_VALUES:
        unit.fail(cursor, f"Metal has no static locals: {cursor.spelling!r}")


def _bfloat_is_made_by_name(unit: _Unit, node: _Node) -> None:
    """Metal converts bfloat to float by itself, never float to bfloat."""
    cursor = node.cursor
    if (
        cursor.kind != CursorKind.UNEXPOSED_EXPR
        or node.parent.kind in _CASTS
        or "__bf16" not in cursor.type.get_canonical().spelling
    ):
        return
    if any(_kind(child.type.get_canonical()) == TypeKind.FLOAT for child in cursor.get_children()):
        unit.fail(cursor, "float becomes bfloat only by name: write T(x)")


def _pointee(declared: Type) -> Type | None:
    declared = declared.get_canonical()
    while _kind(declared) in _ARRAYS:
        declared = declared.element_type
    return declared.get_pointee() if _kind(declared) in _POINTERS else None


def _kind(declared: Type) -> TypeKind:
    try:
        return declared.kind
    except ValueError:  # cindex has no name for half
        return TypeKind.UNEXPOSED


def _place(cursor: Cursor) -> tuple:
    location = cursor.canonical.location
    return _file(location), location.line, location.column


def _file(location: SourceLocation) -> str:
    return Path(location.file.name).name if location.file else ""


def _plain(message: str) -> str:
    """clang's words with Metal's names of address spaces and types."""
    for number, name in ((1, "device"), (2, "constant"), (3, "threadgroup")):
        message = message.replace(f"__attribute__((address_space({number})))", name)
    return message.replace("_Float16", "half").replace("__bf16", "bfloat")

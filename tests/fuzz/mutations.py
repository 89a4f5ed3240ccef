"""Edits of JSON trees, bytes and arrays, described by JSON, so that a case that found something can be kept as a file."""

import copy
import io
import json
import struct

import numpy as np

HUGE = [2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64, 10**15, 10**30, 10**400]
ODD = [None, True, False, [], {}, "", "x", [1], [[]], [["a"], [1]], {"a": 1}, 0, 1, -1, 0.5, 1e-45, 3e38, 1e308]
ODD += [-(10**30), float("inf"), float("nan"), "\ud800", "\x1b[31m", "x" * 5000, [0] * 3000]
SHAPES = [[], [0], [1], [2, 3], [0, 10**12], [10**12, 0], [2**40], [0] * 9, [1] * 33, [2**62, 4]]
TYPES = ["<f2", "<f4", "<f8", ">f4", "<i4", "<i8", "|u1", "|b1", "<c8", "<U3", "|S4", "<M8[s]", "|V2", "|O", "<U0"]
FILLS = [0.0, 1.0, -1.0, float("nan"), float("inf"), 65504.0, 3e38, 1e-40]


def places(value, path=()):
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def edit_json(tree, edit):
    """A tree with one edit: {"at": place, "do": what, "value": JSON}."""
    tree = copy.deepcopy(tree)
    found = list(places(tree))
    if not found:
        return tree
    parent, key = found[edit["at"] % len(found)]
    value, do, given = parent[key], edit["do"], copy.deepcopy(edit["value"])
    if do == "delete":
        del parent[key]
    elif do == "bump" and type(value) in (int, float):
        parent[key] = value + (given if type(given) is int and abs(given) < 2**70 else 1)
    elif do == "copy":
        other, place = found[(given if type(given) is int else 1) % len(found)]
        parent[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[place])
    elif do == "repeat" and isinstance(parent, list):
        parent.extend(copy.deepcopy(value) for _ in range(50))
    elif do == "nest":
        parent[key] = [value]
    elif do == "add" and isinstance(parent, dict):
        parent[f"extra{edit['at'] % 7}"] = given
    else:
        parent[key] = given
    return tree


def edit_bytes(data, edit):
    """Bytes with one edit: {"at": place, "do": what, "value": number}."""
    at, amount = edit["at"] % max(1, len(data)), 1 + edit["value"] % 64
    damaged = bytearray(data)
    if not data or edit["do"] == "insert":
        damaged[at:at] = bytes((edit["value"] * (i + 1)) & 255 for i in range(amount))
    elif edit["do"] == "flip":
        damaged[at] ^= 1 << edit["value"] % 8
    elif edit["do"] == "cut":
        del damaged[at : at + amount]
    elif edit["do"] == "truncate":
        del damaged[at:]
    elif edit["do"] == "word" and len(data) >= 4:
        at = edit["at"] % (len(data) - 3)
        damaged[at : at + 4] = struct.pack("<I", edit["value"] & 0xFFFFFFFF)
    elif edit["do"] == "zero":
        damaged[at : at + amount] = bytes(len(damaged[at : at + amount]))
    else:
        damaged[at] = 255
    return bytes(damaged)


def edit_array(array, edit):
    """The bytes of a .npy file of an array with one edit: {"at": place, "do": what, "value": number}."""
    do, number = edit["do"], edit["value"]
    if do == "shape":
        return npy_bytes(array.tobytes(), array.dtype.str, SHAPES[number % len(SHAPES)])
    if do == "cast" and array.dtype.kind in "fiub":
        with np.errstate(all="ignore"):
            array = array.astype(TYPES[number % 9])
    elif do == "type":
        return npy_bytes(array.tobytes(), TYPES[number % len(TYPES)], array.shape)
    elif do == "fill" and array.size and array.dtype.kind in "fiu":
        array = array.copy()
        with np.errstate(all="ignore"):
            array.reshape(-1)[edit["at"] % array.size :: 1 + number % 5] = np.array(FILLS[number % 8]).astype(
                array.dtype
            )
    elif do == "slice" and array.ndim and array.shape[edit["at"] % array.ndim] > 1:
        array = np.take(array, range(array.shape[edit["at"] % array.ndim] - 1), axis=edit["at"] % array.ndim)
    elif do == "axis":
        array = array[None] if number % 2 or not array.ndim else array[0] if array.shape[0] else array
    elif do == "scalar":
        array = np.zeros((), array.dtype)
    elif do == "order":
        array = np.asfortranarray(array)
    else:
        return edit_bytes(npy_bytes(array.tobytes(), array.dtype.str, array.shape), {**edit, "do": "flip"})
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=False)
    return file.getvalue()


def npy_bytes(data, descr, shape):
    """A .npy file that says what it is told to."""
    text = str({"descr": descr, "fortran_order": False, "shape": tuple(shape)}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def toml_of(value):
    """A value as TOML, which has no null and knows dates, so that some of them come out odd."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return "1979-05-27" if value is None else json.dumps(value)

"""Files of states that cannot be cut, such as recurrences and convolutions: those of one place in a text, bit-exact."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np

from mlxkv.codec import unquantized
from mlxkv.dump import read_state_types
from mlxkv.errors import FormatError
from mlxkv.io import container
from mlxkv.io.container import Reader, encode_section

KIND = "states"


def encode_states(states: Mapping[str, np.ndarray], types: Mapping[str, str], meta: Mapping[str, Any]) -> bytes:
    """Encode the states of one place in a text.

    Parameters
    ----------
    states
        Arrays keyed "layer.index", as `mlxkv.dump.KVDump.states`.
    types
        MLX's type of each of them.
    meta
        JSON values to store in the header as they are.

    Returns
    -------
    bytes
        A container.
    """
    coded = {key: unquantized.encode_array(array) for key, array in states.items()}
    header = {
        "kind": KIND,
        "raw": {key: [kind, list(states[key].shape)] for key, (kind, _) in coded.items()},
        "meta": {**meta, "state_types": dict(types)},
    }
    out = BytesIO()
    container.write(out, header, [encode_section(key, data, "raw") for key, (_, data) in coded.items()])
    return out.getvalue()


def read_states(reader: Reader) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the states of one place in a text.

    Parameters
    ----------
    reader
        The open container, from any source.

    Returns
    -------
    tuple[dict, dict]
        Arrays and MLX's types of them, by key.

    Raises
    ------
    FormatError
        When it is damaged, or no such file.
    """
    described, meta = reader.header.get("raw"), reader.header.get("meta")
    if reader.header.get("kind") != KIND or not isinstance(described, dict) or not isinstance(meta, dict):
        raise FormatError(f"{reader.name} holds no states of a cache")
    types = read_state_types(meta, reader.name)
    if not set(types) == set(described) == set(reader.sections):
        raise FormatError(f"{reader.name} has other states than it describes")
    arrays = {key: unquantized.read_plain_array(reader, key) for key in described}
    return {key: unquantized.to_type(array, types[key], reader.name) for key, array in arrays.items()}, types

"""Where the bytes of a container went, from its header alone (no artifacts needed)."""

from __future__ import annotations

from typing import Any

from mlxkv.codec.reading import read_layout
from mlxkv.codec.unquantized import CACHE_SECTIONS, SINK_SECTIONS, read_description
from mlxkv.errors import FormatError
from mlxkv.io.container import Reader


def summary(reader: Reader) -> dict[str, Any]:
    """Return the sizes of a container's parts and its compression ratios.

    Parameters
    ----------
    reader
        The open container.

    Returns
    -------
    dict
        `tokens`, `batch`, `sinks` and `recent`; `fp16_bytes`, the cache at 16 bits per element, whatever type it had;
        `file_bytes` and its parts `coded_bytes`, `sink_and_window_bytes`, `other_bytes` and `header_bytes`; `ratio` of
        the whole file, and `ratio_middle` of the tokens between sinks and recent tokens against their sections (None if there
        are none).

    Raises
    ------
    FormatError
        When the container is no compressed cache.
    """
    if "layout" not in reader.header:
        raise FormatError(f"{reader.name} is no compressed cache: its header has no layout of tokens")
    layout = read_layout(reader)
    try:
        shapes = [read_description(reader, name)[1] for name in SINK_SECTIONS]
        width = sum(layers * heads * dim for layers, _, heads, _, dim in shapes)
        fp16 = 2 * width * layout.batch * layout.length
        middle = 2 * width * layout.batch * len(layout.middle)
        ratio = fp16 / reader.size
    except (TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{reader.name} is no compressed cache: {error!r}") from None
    described = set(reader.header["raw"])
    stored = {name: section.stored for name, section in reader.sections.items()}
    ends = sum(size for name, size in stored.items() if name.startswith(CACHE_SECTIONS))
    coded = sum(size for name, size in stored.items() if name not in described and not name.startswith(CACHE_SECTIONS))
    other = sum(size for name, size in stored.items() if name in described and not name.startswith(CACHE_SECTIONS))
    return {
        "tokens": layout.length,
        "batch": layout.batch,
        "sinks": layout.sinks,
        "recent": layout.recent,
        "fp16_bytes": fp16,
        "file_bytes": reader.size,
        "coded_bytes": coded,
        "sink_and_window_bytes": ends,
        "other_bytes": other,
        "header_bytes": reader.size - coded - ends - other,
        "ratio": ratio,
        "ratio_middle": middle / coded if coded else None,
    }

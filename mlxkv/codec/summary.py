"""Where the bytes of a container went, from its header alone (no artifacts needed)."""

from __future__ import annotations

from typing import Any

from mlxkv.codec.layout import Layout
from mlxkv.codec.raw import ENDS, SINKS, read_description
from mlxkv.errors import FormatError
from mlxkv.io.container import Reader


def summary(reader: Reader) -> dict[str, Any]:
    """Sizes and ratios. `ratio` counts the whole file; `ratio_middle` only the coded tokens against their sections.

    fp16_bytes is the yardstick, 16 bits an element, whatever type the cache had.
    """
    try:
        layout = Layout.from_json(reader.header["layout"])
        shapes = [read_description(reader, name)[1] for name in SINKS]
        width = sum(layers * heads * dim for layers, _, heads, _, dim in shapes)
        fp16 = 2 * width * layout.batch * layout.length
        middle = 2 * width * layout.batch * len(layout.middle)
        ratio = fp16 / reader.size
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise FormatError(f"{reader.name} is no compressed cache: {error!r}") from None
    raw_names = set(reader.header["raw"])
    stored = {name: section.stored for name, section in reader.sections.items()}
    ends = sum(size for name, size in stored.items() if name.startswith(ENDS))
    coded = sum(size for name, size in stored.items() if name not in raw_names and not name.startswith(ENDS))
    other = sum(size for name, size in stored.items() if name in raw_names and not name.startswith(ENDS))
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

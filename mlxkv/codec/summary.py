"""Where the bytes of a container went, from its header alone (no artifacts needed)."""

from __future__ import annotations

from typing import Any

from mlxkv.codec.reading import read_layouts
from mlxkv.codec.unquantized import CACHE_SECTIONS, SINK_SECTIONS, read_description, split_section
from mlxkv.dump import stream_key
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
        are none). Where layers have several shapes or windows, `groups` lists for each group of them `layers`, `tokens` that it
        holds, `fp16_bytes` and `file_bytes`.

    Raises
    ------
    FormatError
        When the container is no compressed cache.
    """
    if "layout" not in reader.header:
        raise FormatError(f"{reader.name} is no compressed cache: its header has no layout of tokens")
    layouts = read_layouts(reader)
    main = layouts[0]
    try:
        widths, layers = [], []
        for group in range(len(layouts)):
            shapes = [read_description(reader, stream_key(group, name))[1] for name in SINK_SECTIONS]
            layers.append(shapes[0][0])
            widths.append(sum(count * heads * dim for count, _, heads, _, dim in shapes))
        fp16 = [2 * width * layout.batch * layout.length for width, layout in zip(widths, layouts)]
        middle = sum(2 * width * layout.batch * len(layout.middle) for width, layout in zip(widths, layouts))
        ratio = sum(fp16) / reader.size
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise FormatError(f"{reader.name} is no compressed cache: {error!r}") from None
    described = set(reader.header["raw"])
    ends = coded = other = 0
    of_groups = [0] * len(layouts)
    for name, section in reader.sections.items():
        group, own = split_section(name)
        if own.startswith(CACHE_SECTIONS):
            ends += section.stored
        elif name in described:
            other += section.stored
            continue
        else:
            coded += section.stored
        if group < len(of_groups):
            of_groups[group] += section.stored
    facts: dict[str, Any] = {
        "tokens": main.tokens,
        "batch": main.batch,
        "sinks": main.sinks,
        "recent": main.recent,
        "fp16_bytes": sum(fp16),
        "file_bytes": reader.size,
        "coded_bytes": coded,
        "sink_and_window_bytes": ends,
        "other_bytes": other,
        "header_bytes": reader.size - coded - ends - other,
        "ratio": ratio,
        "ratio_middle": middle / coded if coded else None,
    }
    if len(layouts) > 1:
        columns = zip(layers, layouts, fp16, of_groups)
        facts["groups"] = [
            {"layers": count, "tokens": layout.length, "fp16_bytes": whole, "file_bytes": stored}
            for count, layout, whole, stored in columns
        ]
    return facts

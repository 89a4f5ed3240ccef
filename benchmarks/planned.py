"""What `mlxkv plan` says a cache costs: mlxkv/planning/measured.json and the output in docs/plan.md, from committed results.

    python -m benchmarks.planned      which python -m benchmarks.report does, too

A measurement whose recorded settings are no longer those of the preset is left out; tests hold both files against this.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.schema import ENDINGS, FOLDER, RESULTS, Result, result_name
from mlxkv import planning
from mlxkv.cli.plan import show_plan
from mlxkv.codec.methods.direct import DirectCoder
from mlxkv.errors import InputError
from mlxkv.live import live_config, live_methods
from mlxkv.planning.measured import measurements
from mlxkv.presets import presets_of

PATH = Path(planning.__file__).with_name("measured.json")
PAGE = FOLDER.parent / "docs" / "plan.md"
EXAMPLE = FOLDER.parent / "tests" / "fixtures" / "configs" / "qwen3-8b.json"
COMMAND = "mlxkv plan Qwen/Qwen3-8B --context 32K --memory 32GB"
WINDOWED = ("gemma3-270m",)  # models that most layers of which have a sliding window
QUALITY = 38  # of kvtc-rd, as README has it
BITS = "mlx-lm --kv-bits "


def records() -> list[dict[str, Any]]:
    """Return one record for each cache and model: of the first result below that has it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for model in ENDINGS:
        for record in (*_live(model), *_bits(model), *_rotation(model), *_files(model), *_uncalibrated(model)):
            found.setdefault((record["cache"], model), {**record, "windows": model in WINDOWED})
    return [found[key] for key in sorted(found)]


def text() -> str:
    """Return the file's content: one record a line."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records()) + "\n]\n"


def _result(name: str) -> Result | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _live(model: str) -> Iterator[dict[str, Any]]:
    name = result_name("live_methods", model)
    if (result := _result(name)) is not None:
        config = result["config"]
        for row in result["summary"]["fidelity"]:
            if row["model"] == model and _is_preset(row["variant"], config["settings"].get(row["variant"])):
                yield _record(row["variant"], model, config["context"], name, row)


def _bits(model: str) -> Iterator[dict[str, Any]]:
    result = _result("kv_bits")
    if result is not None and result["config"]["model"] == model:
        for row in result["summary"]:
            cache = row["variant"].removeprefix("mlx-lm ")
            if row["variant"].startswith(BITS) or cache in _presets():
                yield _record(cache, model, result["config"]["context_tokens"], "kv_bits", row)


def _rotation(model: str) -> Iterator[dict[str, Any]]:
    result = _result("rotation")
    if result is not None:
        settings, context = result["config"]["settings"], result["config"]["context"]
        for row in result["summary"]:
            if row["model"] == model and _is_preset(row["variant"], settings.get(row["variant"])):
                yield _record(row["variant"], model, context, "rotation", row)


def _files(model: str) -> Iterator[dict[str, Any]]:
    name = result_name("rate_distortion", model)
    if (result := _result(name)) is not None:
        for row in result["summary"]["long"].get("kvtc-rd", ()):
            if row["at"] == QUALITY:
                row = {**row, "share_of_fp16": round(1 / row["ratio"], 6)}
                record = _record("kvtc-rd file", model, int(row["tokens"]), name, row)
                yield {**record, "setting": f"quality {QUALITY}"}


def _uncalibrated(model: str) -> Iterator[dict[str, Any]]:
    name = result_name("uncalibrated", model)
    if (result := _result(name)) is not None:
        settings = {f"direct {DirectCoder.default_quality:g}": f"quality {DirectCoder.default_quality:g}", "exact": ""}
        for row in result["summary"]:
            if row["variant"] in settings:
                cache = f"{row['variant'].partition(' ')[0]} file"
                record = _record(cache, model, row["longest_tokens"], name, row)
                yield {**record, "setting": settings[row["variant"]]}


def _record(cache: str, model: str, tokens: int, result: str, row: dict[str, Any]) -> dict[str, Any]:
    share = row["share_of_fp16"]
    return {
        "cache": cache,
        "model": model,
        "tokens": tokens,
        "texts": row["texts"],
        "kl": row["kl"],
        "share": share,
        "result": result,
        "setting": "",
    }


def _presets() -> list[str]:
    return presets_of(live_methods.names())


def _is_preset(name: str, settings: Any) -> bool:
    """Return whether a preset still has the settings that were recorded, which older results hold as text."""
    if name not in _presets() or settings is None:
        return False
    if isinstance(settings, str):
        settings = {key: ast.literal_eval(value) for key, value in re.findall(r"(\w+)=([^,)]+)", settings)}
    current = live_config(name)
    try:
        return type(current).from_saved(settings) == current
    except InputError:  # settings that there are no more
        known = {key: value for key, value in settings.items() if key in type(current).stored_keys().values()}
        return type(current).from_saved(known) == current


def page(before: str) -> str:
    """Return docs/plan.md with the output of its command as it is now."""
    lines = io.StringIO()
    with redirect_stdout(lines), _columns(80):
        show_plan("Qwen/Qwen3-8B", planning.plan(EXAMPLE, 32 * 1024, memory=32 * 10**9))
    output = "\n".join(line.rstrip() for line in lines.getvalue().splitlines())
    start, _, rest = before.partition(f"```\n{COMMAND}\n```\n\n```\n")
    return f"{start}```\n{COMMAND}\n```\n\n```\n{output}\n```{rest.partition('```')[2]}"


@contextmanager
def _columns(count: int) -> Iterator[None]:
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        os.environ.update({} if before is None else {"COLUMNS": before})


def write() -> list[Path]:
    """Write both files.

    Returns
    -------
    list of Path
        The files.
    """
    PATH.write_text(text(), encoding="utf-8")
    measurements.cache_clear()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return [PATH, PAGE]


if __name__ == "__main__":
    print(*write(), sep="\n")

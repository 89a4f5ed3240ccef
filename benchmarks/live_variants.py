"""What `live_methods` compares: every live preset, further points of two curves, and which method a variant is of."""

from __future__ import annotations

from functools import cache

from benchmarks import uniform
from benchmarks.held_out import CONTEXT
from benchmarks.live_runs import Variants
from mlxkv.live import live_config, live_methods
from mlxkv.presets import method_preset, preset_names

KEEPS_ALL = f"-{CONTEXT}"  # of presets with nothing to give up in this context


@cache
def presets() -> Variants:
    """Every live preset but those that would keep the context whole; `full` first."""
    smaller = [name for name in preset_names("methods") if not name.endswith(KEEPS_ALL)]
    live = [name for name in smaller if method_preset(name).method in live_methods.names()]
    return {name: live_config(name) for name in sorted(live, key=lambda name: (name != "full", name))}


@cache
def references() -> Variants:
    """What the curves of uniform quantization and KIVI have besides presets."""
    return {
        **{f"uniform-{bits}": uniform.Settings(bits) for bits in (2, 3, 16)},
        **{f"kivi-{bits}": live_config("kivi", bits=bits) for bits in (3, 8)},
    }


def method_of(variant: str) -> str:
    """The line of the picture that a variant is a point of."""
    if variant.startswith(("int", "uniform")):
        return "uniform"
    if variant.startswith("kvtc"):
        return variant.rpartition("-")[0]
    settings = {**presets(), **references()}[variant]
    return str(type(settings).__module__).rpartition(".")[2].replace("_", "-")

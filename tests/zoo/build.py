"""Model types from mlx-lm's own folder, and a tiny random model of each."""

import ast
import copy
import inspect
import re
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from conftest import drawn_once
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from zoo.configurations import CONFIGURATIONS

# What cannot be built or run here, and why.
CANNOT_RUN = {
    "bitnet": "its linear layers exist as a Metal kernel only",
    "olmo": "mlx-lm's module ends the process without the package ai2-olmo, and with it a prompt of two tokens raises: the "
    "mask is the word causal, which is added to scores",
    "muse_spark": "its norms, router and rotation exist as Metal kernels only",
}


@cache
def model_types() -> list[str]:
    """Every module of mlx-lm's folder that binds `Model` and `ModelArgs`, so that a new type shows up by itself."""
    folder = Path(mlx_lm.models.__path__[0])
    return sorted(path.stem for path in folder.glob("*.py") if {"Model", "ModelArgs"} <= _bound(path))


def _bound(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def configuration(name: str) -> dict:
    """The configuration of a type, as its config.json would read."""
    found = copy.deepcopy(CONFIGURATIONS[name])  # some ModelArgs write into what they are given
    return {"model_type": name, **found}


def build(name: str, seed: int = 0) -> nn.Module:
    """A random float32 model of this type, in evaluation mode."""
    config = configuration(name)
    model_class, arguments = _get_classes(config)
    key = repr(sorted(config.items()))
    return drawn_once(lambda: model_class(arguments.from_dict(config)), seed, key, _random_like, _centre_norms)


def cache_kinds(model: nn.Module) -> list[str]:
    """The kinds of mlx-lm's caches that the model's layers have, each once."""
    return sorted({_kind(each) for each in make_prompt_cache(model)})


def _kind(each: object) -> str:
    name, parts = type(each).__name__, getattr(each, "caches", None)
    return name if parts is None else f"{name}({', '.join(map(_kind, parts))})"


def vocabulary(name: str) -> int:
    """How many token ids the model knows."""
    config = configuration(name)
    return config.get("vocab_size") or config.get("num_vocab") or config["text_config"]["vocab_size"]


def tokens(name: str, length: int, seed: int = 1) -> list[int]:
    """Random token ids of this model's vocabulary."""
    return mx.random.randint(0, vocabulary(name), (length,), key=mx.random.key(seed)).tolist()


def _centre_norms(model: nn.Module) -> None:
    """Norms that add 1 to their weights start from 1 in mlx-lm, twice the gain: attention would see one token only."""
    for module in model.modules():
        source = inspect.getsource(type(module).__call__) if "norm" in type(module).__name__.lower() else ""
        if re.search(r"\b1(\.0)? \+ self\.weight|self\.weight \+ 1", source):
            module.weight = module.weight - mx.round(module.weight.mean())


def _random_like(parameter: mx.array) -> mx.array:
    # Wide weights: with mlx-lm's initial ones a tiny model hardly looks at its cache.
    if parameter.dtype == mx.uint32:  # packed integers of a quantized matrix
        return mx.random.randint(0, 2**31, parameter.shape).astype(mx.uint32)
    if not mx.issubdtype(parameter.dtype, mx.floating):
        return parameter
    noise = mx.random.normal(parameter.shape)
    if parameter.ndim <= 1 or mx.all(parameter == 1).item():
        return parameter.astype(mx.float32) + 0.1 * noise  # norm weights stay around 1, biases around 0
    fan_in = parameter.shape[-1] if parameter.shape[-1] > 1 else parameter.shape[-2]
    return 1.5 * fan_in**-0.5 * noise

"""The config.json of a model: found by the model's name, bounded, and the class of mlx-lm's that it is of.

A config may come from anywhere: it is only read, and no code that it names is ever run.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlxkv.bundled import models as bundled
from mlxkv.errors import FormatError, InputError, ModelNotFoundError, UnsupportedError, suggest
from mlxkv.io.inputs import MAX_JSON, read_bytes
from mlxkv.spec import is_int

FILE = "config.json"
MOST_DEEP = 32  # objects and lists within each other; published ones have up to 6
MOST_LAYERS = 512  # published models have up to 126
MOST_COUNT = 2**16  # of heads, experts and other things that a model may make one by one
MOST_NUMBER = 2**27  # of anything else; contexts and vocabularies stay below
_COUNTS = re.compile(r"head|expert|block|group|interval|pattern|depth|kernel|codebook|neighbo|split")
_LAYERS = re.compile(r"layers?$")
_FREE = re.compile(r"token|seed|version|theta|base|factor|_ids?$|index$")  # nothing is made by such numbers
_TAGGED = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}  # as Transformers writes them


def read_config(name: str | Path) -> dict[str, Any]:
    """Read a model's config.json.

    Parameters
    ----------
    name
        A folder of mlx-lm's kind, a config.json, a hub id such as "org/name", or a name of `mlxkv.bundled.models`. Of a hub
        id only this file is fetched, and a copy in the hub's own cache is used before.

    Returns
    -------
    dict
        The configuration.

    Raises
    ------
    ModelNotFoundError
        When nothing has that name, or the hub cannot be asked.
    FormatError
        When the file is no JSON object.
    """
    path = _config_path(str(name))
    try:
        config = json.loads(read_bytes(path, MAX_JSON), object_hook=_untagged)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} should be a JSON object with a model_type")
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a configuration with numbers that no model has, before any is built of it.

    Parameters
    ----------
    config
        The configuration, of any source.

    Raises
    ------
    InputError
        For numbers out of all bounds, and for objects nested too deeply.
    UnsupportedError
        When the model needs Python code of its own.
    """
    if config.get("model_file") is not None:
        raise UnsupportedError(
            "this model needs Python code of its own (model_file), which is never run here",
            "plan for a model of a type that mlx-lm has",
        )
    for key, number in _numbers(config):
        most = MOST_LAYERS if _LAYERS.search(key) else MOST_COUNT if _COUNTS.search(key) else MOST_NUMBER
        if abs(number) > most and not _FREE.search(key):
            raise InputError(f"{key[:80]} of this config.json is {_shown(number)}: there may be at most {most:,}")


def model_class(config: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return the classes that mlx-lm would build a model from.

    Parameters
    ----------
    config
        The configuration.

    Returns
    -------
    name : str
        The module of `mlx_lm.models`.
    model : type
        The model's class.
    arguments : type
        The class of its arguments.

    Raises
    ------
    InputError
        When the configuration names no type.
    UnsupportedError
        When mlx-lm has no such type, or its module cannot be imported here.
    """
    name = _module_name(config)
    folder = _models_folder()
    if not re.fullmatch(r"[\w-]+", name, re.ASCII) or not (folder / f"{name}.py").is_file():
        raise UnsupportedError(f"mlx-lm has no model type {name[:80]!r}", suggest(name, model_types()))
    try:
        with redirect_stdout(io.StringIO()):  # which is for our own output
            module = importlib.import_module(f"mlx_lm.models.{name}")
        return name, module.Model, module.ModelArgs
    except AttributeError:
        raise UnsupportedError(f"mlx-lm has no model type {name[:80]!r}", suggest(name, model_types())) from None
    except (Exception, SystemExit) as error:  # a module may want packages that are not there, and even end the process
        raise UnsupportedError(f"mlx-lm's model type {name!r} cannot be imported here: {error!r}") from error


def model_types() -> list[str]:
    """Return the model types that mlx-lm has modules for.

    Returns
    -------
    list of str
        Sorted.
    """
    paths = sorted(_models_folder().glob("*.py"))
    return [
        path.stem for path in paths if re.search(r"\bModelArgs\b", path.read_text(encoding="utf-8", errors="replace"))
    ]


def trained_context(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a model was made for.

    Parameters
    ----------
    config
        The configuration.

    Returns
    -------
    int or None
        None where it does not say.
    """
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
            if is_int(part.get(key), 1):
                return int(part[key])
    return None


def _config_path(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / FILE).is_file():
            raise ModelNotFoundError(f"{path.absolute()} is no folder of a model: it has no {FILE}")
        return path / FILE
    if path.is_file():
        return path
    if (found := bundled.model_path(name)) is not None:
        return found / FILE
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        return _from_hub(name)
    near = suggest(name, bundled.names()).partition("? ")
    raise ModelNotFoundError(
        f"no model {name[:200]!r}",
        f"{''.join(near[:2]) if near[1] else ''}give a model folder, a config.json, or a hub id such as org/name",
    )


def _from_hub(name: str) -> Path:
    """Return config.json of a hub repository: a copy that is there already, else a download of this file alone."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        if isinstance(found := try_to_load_from_cache(name, FILE), str):
            return Path(found)
        return Path(hf_hub_download(name, FILE))
    except Exception as error:  # the hub's client raises dozens of types; their message is the reason
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelNotFoundError(
            f"cannot get {FILE} of {name}: {reason[:200]}",
            f"is the id right, and is there a network? A {FILE} that you have will do: mlxkv plan path/to/{FILE}",
        ) from error


def _shown(number: int) -> str:
    return f"{number:,}" if abs(number) < 10**12 else "a number of more than 12 digits"


def _untagged(value: dict[str, Any]) -> Any:
    return _TAGGED.get(str(value["__float__"]), value) if set(value) == {"__float__"} else value


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Yield every whole number with the key that it is under."""
    waiting: list[tuple[str, Any, int]] = [("", config, 0)]
    while waiting:
        key, value, deep = waiting.pop()
        if deep > MOST_DEEP:
            raise InputError(f"this config.json nests more than {MOST_DEEP} objects in each other")
        if isinstance(value, Mapping):
            waiting += [(str(name), part, deep + 1) for name, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, part, deep + 1) for part in value]
        elif type(value) is int:
            yield key, value


def _module_name(config: Mapping[str, Any]) -> str:
    """Return the module that mlx-lm takes for a configuration, as its `_get_classes` does."""
    name = config.get("model_type")
    if not isinstance(name, str):
        raise InputError("this config.json has no model_type, so it is none of a model that mlx-lm can build")
    architectures = config.get("architectures") or ()
    architectures = (architectures,) if isinstance(architectures, str) else architectures
    by_architecture = _table("MODEL_ARCHITECTURE_REMAPPING")
    for each in architectures if isinstance(architectures, list | tuple) else ():
        if isinstance(each, str) and (name, each) in by_architecture:
            return str(by_architecture[name, each])
    return str(_table("MODEL_REMAPPING").get(name, name))


def _table(name: str) -> Mapping[Any, str]:
    """Return a table of mlx-lm's `utils`, whose import would take most of a second, from its text where it can be."""
    if "mlx_lm.utils" not in sys.modules:
        text = (_models_folder().parent / "utils.py").read_text(encoding="utf-8")
        if found := re.search(rf"^{name} = (\{{.*?^\}})", text, re.MULTILINE | re.DOTALL):
            try:
                return ast.literal_eval(found[1])
            except (ValueError, SyntaxError):
                pass
    return getattr(importlib.import_module("mlx_lm.utils"), name, {})


def _models_folder() -> Path:
    spec = find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise UnsupportedError("mlx-lm is not installed", "pip install mlx-lm")
    return Path(spec.submodule_search_locations[0]) / "models"

"""A cache for a text to begin in: a new one, or one that a file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxkv.cli._files import COMPRESSED, DUMP, LIVE, kind_of
from mlxkv.cli._output import note
from mlxkv.cli._work import working

if TYPE_CHECKING:
    from mlxkv.dump import KVDump


class Beginning(NamedTuple):
    """A cache that a text begins in; all that can be wrong without the model was found when it was made."""

    make: Callable[[Any], list[Any]]  # from a model to its prompt cache
    tokens: list[int] | None  # in that cache; None where a file does not name them
    kind: str = ""  # of the file, in words
    notes: Mapping[str, Any] = MappingProxyType({})  # what else the file of a live cache says


def new_cache(method: str | None) -> Beginning:
    """Return how a new cache is made: a live one, or mlx-lm's own. Raises PresetError for a live one that is not there."""
    from mlxkv.live import live_config

    if method is not None:
        live_config(method)

    def make(model: Any) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        from mlxkv.live.seam import make_cache

        return make_prompt_cache(model) if method is None else list(make_cache(model, method))

    return Beginning(make, [])


def read_beginning(file: Path, artifacts: Path | None, limit: int | None, model: str) -> Beginning:
    """Read a file of any kind, as far as that needs no model."""
    from mlxkv.errors import InputError

    kind = kind_of(file)
    if kind == COMPRESSED:
        from mlxkv.conversion import read_content

        with working(f"decompressing {file}"):
            return _of_dump(file, read_content(file, "mlxkv", artifacts=artifacts, limit=limit).dump, kind)
    if kind == DUMP:
        return _of_dump(file, _read_dump(file, artifacts), kind)
    if artifacts is not None:
        raise InputError(f"{file} is {kind}, which takes no --artifacts", "leave them out")
    return _live(file, kind) if kind == LIVE else _prompt_cache(file, kind, model)


def _of_dump(file: Path, dump: KVDump | None, kind: str) -> Beginning:
    from mlxkv import lm
    from mlxkv.errors import UnsupportedError

    assert dump is not None
    if dump.tokens.shape[0] != 1:
        raise UnsupportedError(f"{file} is of {dump.tokens.shape[0]} texts; only one can be gone on with")
    return Beginning(lambda model: lm.restore(model, dump), dump.tokens[0].tolist(), kind)


def _read_dump(file: Path, artifacts: Path | None) -> KVDump:
    """Read a dump; artifacts are of no use to it, and those of another model are a mistake."""
    from mlxkv.codec.artifacts import CalibrationArtifacts
    from mlxkv.dump import read_dump
    from mlxkv.errors import MismatchError
    from mlxkv.identity import same_model

    with working(f"reading {file}"):
        dump = read_dump(file)
    if artifacts is not None:
        of = CalibrationArtifacts.from_dir(artifacts).meta.get("model_fingerprint", "")
        if not same_model(str(of), dump.fingerprint):
            raise MismatchError(
                f"{artifacts} are artifacts of another model than {file} is from",
                "a dump is not compressed and needs none: leave --artifacts out",
            )
        note(f"{file} is a dump, not compressed: --artifacts is not needed")
    return dump


def _live(file: Path, kind: str) -> Beginning:
    from mlxkv.conversion import noted_tokens
    from mlxkv.live.serialization import load_cache, read_notes

    return Beginning(lambda model: list(load_cache(file, model)), noted_tokens(file), kind, read_notes(file))


def _prompt_cache(file: Path, kind: str, model: str) -> Beginning:
    from mlxkv.live.prompt_files import describe_prompt_cache, read_prompt_cache

    facts = describe_prompt_cache(file)
    if facts["model_fingerprint"] is None:
        maker = facts["metadata"].get("model", "")[:80]
        says = f"says it is of {maker!r}" if maker and maker != model else "does not say of which weights it is"
        note(f"{file}, a prompt cache of mlx-lm, {says}; only its layers and shapes are compared with {model}")
    return Beginning(lambda loaded: read_prompt_cache(file, loaded), facts["token_ids"], kind)

"""The file that --save writes after a text: the cache that it ended with, for the next command to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxkv.cli._checks import check_out_file
from mlxkv.cli._files import COMPRESSED, kind_by_ending
from mlxkv.cli._output import progress_bar
from mlxkv.cli._work import promise, working

if TYPE_CHECKING:
    from mlxkv.cli._beginnings import Beginning
    from mlxkv.codec.session import CacheCodec
    from mlxkv.dump import KVDump
    from mlxkv.io.ownership import Ownership

_WITH_TOKENS = ("npz", "mlxkv")


class Saving(NamedTuple):
    """A file to write, and where the cache comes from."""

    out: Path
    kind: str  # of `mlxkv.conversion`
    begun: Beginning
    file: Path | None  # that the text goes on from
    artifacts: Path | None
    owned: Ownership  # so that no conversation writes the file meanwhile

    @property
    def appends(self) -> bool:
        """Whether the file that was gone on from is extended in its place."""
        return self.file is not None and self.out.resolve() == self.file.resolve() and self._from_compressed

    @property
    def _from_compressed(self) -> bool:
        return self.kind == "mlxkv" and self.begun.kind == COMPRESSED

    def check_cache(self, cache: Sequence[Any]) -> None:
        """Raise InputError, before a text is written, where the file cannot hold such a live cache."""
        from mlxkv import stock
        from mlxkv.errors import InputError
        from mlxkv.live import LayerCache

        live = [entry for entry in stock.entries(cache) if isinstance(entry, LayerCache)]
        giving_up = sorted({entry.method_name for entry in live if not entry.any_use})
        if giving_up and self.kind != "live":
            raise InputError(
                f"{self.out} would hold all tokens, and {giving_up[0]} gives some up, merges or sorts them",
                "a name that ends in .cache saves the live cache as it is",
            )

    def write(self, model: Any, name: str, cache: list[Any], tokens: list[int] | None) -> dict[str, Any]:
        """Write the file, and return facts of it."""
        as_it_was = f"{self.out} is as it was, or the next command that opens it completes it"
        with working(f"writing {self.out}", as_it_was if self.appends else "", spin=self.kind != "mlxkv"):
            if self.kind == "mlxkv":
                assert tokens is not None  # or checked
                self._compress(model, name, cache, tokens)
            elif self.kind == "live":
                self._save_live(model, cache, tokens)
            else:
                from mlxkv.conversion import Content, write_content

                write_content(self.out, self.kind, Content(cache=cache, tokens=tokens), model, name=name)
        self.owned.release()
        return {"saved": str(self.out), "file_bytes": self.out.stat().st_size}

    def _save_live(self, model: Any, cache: list[Any], tokens: list[int] | None) -> None:
        from mlxkv import stock
        from mlxkv.live import LayerCache
        from mlxkv.live.exchange import live_cache, plain_cache
        from mlxkv.live.serialization import save_cache

        if not any(isinstance(entry, LayerCache) for entry in stock.entries(cache)):
            cache = list(live_cache(model, "full", plain_cache(model, cache)))
        notes = {key: value for key, value in self.begun.notes.items() if key != "tokens"}
        save_cache(self.out, model, cache, notes=notes if tokens is None else {**notes, "tokens": tokens})

    def _compress(self, model: Any, name: str, cache: list[Any], tokens: list[int]) -> None:
        """Compress the cache; of a compressed file that was gone on from, complete blocks stay as they are coded."""
        from mlxkv import lm, stock
        from mlxkv.codec import library
        from mlxkv.codec.session import CacheCodec
        from mlxkv.live.exchange import plain_cache
        from mlxkv.models import cache_spec

        spec, fingerprint, cache = cache_spec(model), lm.fingerprint(model), plain_cache(model, cache)
        kind = str(stock.entries(cache)[spec.groups[0].indices[0]].keys.dtype).removeprefix("mlx.core.")
        codec, stated = self._codec_of_file() if self._from_compressed else (None, {})
        goes_on = codec is not None and stated.get("dtype") == kind
        start = codec.append_start(str(self.file), tokens) if codec and goes_on else 0
        dump = lm.extract_cache(
            cache, spec, [tokens], model=stated.get("model", name), fingerprint=fingerprint, start=start,
            dtype="float16" if kind == "float16" else "float32",
        )  # fmt: skip
        codec = codec or CacheCodec(library.for_model(spec, fingerprint, name))
        with progress_bar("compressing", dump.length) as advance:
            if goes_on and self.appends:
                codec.append_dump(self.out, dump, advance)
            else:
                data = self._appended(codec, dump, advance) if goes_on else codec.compress_dump(dump, advance)
                _write(self.out, data)

    def _codec_of_file(self) -> tuple[CacheCodec, Mapping[str, Any]]:
        """Return the codec that the file was made with, and what the file says of its cache."""
        from mlxkv.codec import library
        from mlxkv.codec.artifacts import CalibrationArtifacts
        from mlxkv.codec.reading import header_object
        from mlxkv.io.container import Reader
        from mlxkv.session.files import codec_of_file

        assert self.file is not None
        folder = self.artifacts
        artifacts = library.for_file(self.file) if folder is None else CalibrationArtifacts.from_dir(folder)
        with Reader(self.file) as reader:
            return codec_of_file(self.file, artifacts), header_object(reader, "meta")

    def _appended(self, codec: CacheCodec, dump: KVDump, progress: Callable[[int], None]) -> bytes:
        """Return the file that was gone on from, extended; it stays as it is."""
        assert self.file is not None
        with TemporaryDirectory() as folder:
            copy = Path(folder, "copy.mlxkv")
            _write(copy, self.file.read_bytes())
            codec.append_dump(copy, dump, progress)
            return copy.read_bytes()


def check_saving(out: Path | None, begun: Beginning, file: Path | None, artifacts: Path | None) -> Saving | None:
    """Return what to write after the text, if anything; raise InputError for what cannot be written."""
    from mlxkv.errors import InputError
    from mlxkv.io.ownership import Ownership

    if out is None:
        return None
    kind = kind_by_ending(out)
    check_out_file(out)
    if begun.tokens is None and kind in _WITH_TOKENS:
        raise InputError(
            f"{file} does not name its tokens, and a file like {out} does",
            "mlxkv convert adds them, with --prompt-file; or save as .cache or .safetensors",
        )
    saving = Saving(out, kind, begun, file, artifacts, Ownership(out))
    promise("" if saving.appends else f"{out} was not written")
    return saving


def _write(path: Path, data: bytes) -> None:
    from mlxkv.io.atomic import atomic_write

    with atomic_write(path) as file:
        file.write(data)

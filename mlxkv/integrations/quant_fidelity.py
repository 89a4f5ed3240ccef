"""Adapter of live caches to the evaluator mlx-quant-fidelity 0.10, https://github.com/IonDen/mlx-quant-fidelity.

    from mlx_quant_fidelity.probes.kv import score_kv_config

    method = LiveMethod(model, "smartkv-0.3")
    report = score_kv_config(InChunks(model, 16), corpus, model_id="...", method=method)

The evaluator's protocol `KVCacheMethod` is structural, so the evaluator is not imported here. The protocol passes no
model to a method, but live caches need one. So use `score_kv_config`, which takes a loaded model, and not
`measure_kv_fidelity`.

The result depends on how tokens are fed, since the queries of a chunk see their own chunk exactly. If a text is fed in
one chunk, as by default, every live cache is exact, and the evaluator raises its ExactZeroError. `InChunks` feeds a few
tokens at a time, as generation does. `quantize_start=n` converts the exact keys and values of n tokens and then feeds
the rest in one chunk. Methods that depend on attention do not support it, since the queries of the n tokens are not
passed on.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv import stock
from mlxkv.errors import UnsupportedError
from mlxkv.live import LayerCache, live_config, make_cache
from mlxkv.live.exchange import live_cache
from mlxkv.version import __version__


@dataclass(frozen=True)
class LiveMethod:
    """A live preset, or a method with its default settings, as the evaluator's `KVCacheMethod`, for one model.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    preset
        The name of a live preset or method.

    Raises
    ------
    PresetError
        For an unknown name.
    """

    model: Any
    preset: str

    def __post_init__(self) -> None:
        live_config(self.preset)

    @property
    def name(self) -> str:
        """The name of the package in reports."""
        return "mlxkv"

    @property
    def label(self) -> str:
        """The name of the preset in reports."""
        return self.preset

    @property
    def params(self) -> dict[str, int]:
        """Integer settings, the only ones that a report accepts here; `provenance` has all settings."""
        settings = dataclasses.asdict(live_config(self.preset))
        return {key: value for key, value in settings.items() if type(value) is int}

    def validate_before_load(self) -> None:
        """Do nothing: unknown presets are refused on construction."""

    def ensure_available(self) -> None:
        """Do nothing: no other package is needed."""

    def check(self, *, head_dim: int | None, model_type: str) -> list[str]:
        """Return no warnings: `probe_capability` checks the model itself.

        Parameters
        ----------
        head_dim, model_type
            Not used.

        Returns
        -------
        list of str
            Empty.
        """
        return []

    def probe_capability(self, empty_cache: list[object]) -> None:
        """Check that the model supports this method.

        Parameters
        ----------
        empty_cache
            mlx-lm's own cache, for the number of layers.

        Raises
        ------
        UnsupportedError
            If it does not.
        """
        self.make_cache(n_layers=len(empty_cache))

    def make_cache(self, *, n_layers: int) -> list[object]:
        """Make an empty live cache.

        Parameters
        ----------
        n_layers
            Not used: the model determines it.

        Returns
        -------
        list
            One entry per layer, as `mlxkv.make_cache` returns them.
        """
        return [*make_cache(self.model, self.preset)]

    def convert_prefix(self, fp_cache: list[object]) -> list[object]:
        """Convert mlx-lm's caches: make live caches that absorb their tokens in one chunk.

        Parameters
        ----------
        fp_cache
            mlx-lm's caches after a prefix, keys and values `[B, Hkv, T, D]`.

        Returns
        -------
        list
            One entry per layer; entries of layers without live caches are passed through.

        Raises
        ------
        UnsupportedError
            For a method that depends on the attention that tokens get.
        """
        try:
            return [*live_cache(self.model, self.preset, fp_cache)]
        except UnsupportedError as error:
            hint = "measure with quantize_start=0 and InChunks(model, n)" if "queries" in error.message else error.hint
            raise UnsupportedError(error.message, hint) from error

    def guard(self) -> AbstractContextManager[None]:
        """Return a context that does nothing.

        Returns
        -------
        AbstractContextManager
            For the evaluator's run.
        """
        return nullcontext()

    def bytes_per_token(self, *, n_layers: int, n_kv_heads: int, head_dim: int) -> int:
        """Return an upper bound of the bytes per token, since a method's bytes may depend on the text's length.

        Parameters
        ----------
        n_layers, n_kv_heads, head_dim
            The model's shape.

        Returns
        -------
        int
            2 bytes per element of keys and values.
        """
        return 2 * 2 * n_layers * n_kv_heads * head_dim

    def working_set_bytes(self, *, window: int, n_layers: int, n_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
        """Return the bytes of one layer's unpacked keys and values, needed during the attention of a prefill chunk.

        Parameters
        ----------
        window
            Number of tokens.
        n_layers
            Not used: layers are unpacked one at a time.
        n_kv_heads, head_dim
            The model's shape.
        dtype_bytes
            Bytes per element.

        Returns
        -------
        int
            Bytes.
        """
        return 2 * window * n_kv_heads * head_dim * dtype_bytes

    def measured_bytes(self, cache: list[object]) -> int:
        """Return the bytes that live caches hold.

        Parameters
        ----------
        cache
            One entry per layer.

        Returns
        -------
        int
            Bytes, without entries of other layers.
        """
        return sum(entry.nbytes for entry in stock.entries(cache) if isinstance(entry, LayerCache))

    def provenance(self) -> dict[str, str]:
        """Return the description of the method for reports.

        Returns
        -------
        dict of str to str
            Package, version, preset and all settings.
        """
        settings = {key: str(value) for key, value in dataclasses.asdict(live_config(self.preset)).items()}
        return {"package": "mlxkv", "version": __version__, "preset": self.preset, **settings}

    def report_warnings(self) -> list[str]:
        """Return the warnings for reports.

        Returns
        -------
        list of str
            One sentence, on bytes per token.
        """
        return ["the analytic bytes per token are an upper bound; those measured are for the full length of the text"]


@dataclass(frozen=True)
class InChunks:
    """Wrapper that feeds a model its tokens a few at a time; all other attributes are the model's.

    Parameters
    ----------
    model
        A model that mlx-lm loaded.
    chunk
        Number of tokens to feed at a time.
    """

    model: Any
    chunk: int

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Return the model's logits.

        Parameters
        ----------
        tokens
            `[B, T]`.
        cache
            A prompt cache.

        Returns
        -------
        mx.array
            `[B, T, vocabulary]`.
        """
        parts = []
        for start in range(0, tokens.shape[1], self.chunk):
            parts.append(self.model(tokens[:, start : start + self.chunk], cache=cache))
            mx.eval(parts[-1], [entry.state for entry in cache])
        return mx.concatenate(parts, axis=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

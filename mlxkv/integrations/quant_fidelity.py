"""Live caches under mlx-quant-fidelity, an evaluator by others: https://github.com/IonDen/mlx-quant-fidelity, version 0.10.

    from mlx_quant_fidelity.probes.kv import score_kv_config

    method = LiveMethod(model, "smartkv-0.3")
    report = score_kv_config(InChunks(model, 16), corpus, model_id="...", method=method)

Its protocol `KVCacheMethod` is structural, so nothing of it is imported here. It gives a method no model, which live
caches need: hence the entry point that takes a loaded one, and not `measure_kv_fidelity`.

How the tokens are fed decides what is measured, since a live cache shows a chunk to itself exactly. Given a text in one
chunk, as by default, every live cache is exact, and the evaluator raises its ExactZeroError. `InChunks` feeds a few tokens
at a time, as generation does. `quantize_start=n` converts the exact keys and values of n tokens and then gives the rest in
one chunk; methods that go by attention cannot do this, as the queries are not handed over.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxkv.errors import UnsupportedError
from mlxkv.live import live_config
from mlxkv.live.base import LayerCache
from mlxkv.live.seam import make_cache
from mlxkv.version import __version__


@dataclass(frozen=True)
class LiveMethod:
    """A live preset, or a method with its default settings, as the evaluator's `KVCacheMethod`; for this model only.

    Raises PresetError for an unknown one.
    """

    model: Any
    preset: str

    def __post_init__(self) -> None:
        live_config(self.preset)

    @property
    def name(self) -> str:
        return "mlxkv"

    @property
    def label(self) -> str:
        return self.preset

    @property
    def params(self) -> dict[str, int]:
        """The settings that are whole numbers, which is all that a report takes; `provenance` has them all."""
        settings = dataclasses.asdict(live_config(self.preset))
        return {key: value for key, value in settings.items() if type(value) is int}

    def validate_before_load(self) -> None:
        """Nothing: an unknown preset has already been refused."""

    def ensure_available(self) -> None:
        """Nothing: no other package is needed."""

    def check(self, *, head_dim: int | None, model_type: str) -> list[str]:
        """No warnings: `probe_capability` tries the model itself."""
        return []

    def probe_capability(self, empty_cache: list[object]) -> None:
        """Raises UnsupportedError for a model that cannot have this cache."""
        self.make_cache(n_layers=len(empty_cache))

    def make_cache(self, *, n_layers: int) -> list[object]:
        return make_cache(self.model, self.preset)

    def convert_prefix(self, fp_cache: list[object]) -> list[object]:
        """Caches that have absorbed the exact keys and values `[B, Hkv, T, D]` of mlx-lm's own, in one chunk.

        Other layers' caches are passed on. Raises UnsupportedError for a method that needs the attention they got.
        """
        caches: list[Any] = self.make_cache(n_layers=len(fp_cache))
        for i, (exact, cache) in enumerate(zip(fp_cache, caches)):
            if not isinstance(cache, LayerCache):
                caches[i] = exact
                continue
            if cache.observation_window:
                raise UnsupportedError(
                    f"{self.preset} goes by attention, and a prefix of keys and values comes without its queries: "
                    "measure with quantize_start=0 and InChunks(model, n)"
                )
            keys, values = exact.keys_and_values()  # type: ignore[attr-defined]
            cache.absorb(keys, values, None)
            cache.offset = keys.shape[2]
        mx.eval([cache.state for cache in caches])
        return caches

    def guard(self) -> AbstractContextManager[None]:
        return nullcontext()

    def bytes_per_token(self, *, n_layers: int, n_kv_heads: int, head_dim: int) -> int:
        """The most that a long text takes, 2 bytes an element: what a budget of tokens takes depends on the length."""
        return 2 * 2 * n_layers * n_kv_heads * head_dim

    def working_set_bytes(self, *, window: int, n_layers: int, n_kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
        """Of one layer's keys and values, unpacked for as long as their attention takes."""
        return 2 * window * n_kv_heads * head_dim * dtype_bytes

    def measured_bytes(self, cache: list[object]) -> int:
        return sum(entry.nbytes for entry in cache if isinstance(entry, LayerCache))

    def provenance(self) -> dict[str, str]:
        settings = {key: str(value) for key, value in dataclasses.asdict(live_config(self.preset)).items()}
        return {"package": "mlxkv", "version": __version__, "preset": self.preset, **settings}

    def report_warnings(self) -> list[str]:
        return ["the analytic bytes per token are an upper bound; those measured are of the text's whole length"]


@dataclass(frozen=True)
class InChunks:
    """A model that reads its tokens `chunk` at a time, whatever is given at once; in all else it is `model`."""

    model: Any
    chunk: int

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits `[B, T, vocabulary]` of tokens `[B, T]`."""
        parts = []
        for start in range(0, tokens.shape[1], self.chunk):
            parts.append(self.model(tokens[:, start : start + self.chunk], cache=cache))
            mx.eval(parts[-1], [entry.state for entry in cache])
        return mx.concatenate(parts, axis=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

"""Drawing of the next token: options that mlx_lm.generate and mlx_lm.chat have, by the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer


def _option(name: str, what: str, low: float, high: float, kind: str = "X") -> Any:
    """Return an option whose value lies in a range; not a number and infinity do not."""

    def check(value: Any) -> Any:
        if value is not None and not low <= value <= high:
            raise typer.BadParameter(f"{value} is not in {low:g} to {high:g}")
        return value

    return typer.Option(name, metavar=kind, help=what, callback=check, show_default=False, rich_help_panel="Sampling")


Temp = Annotated[float, _option("--temp", "Temperature; at 0 the likeliest is taken (0).", 0, 100)]
TopP = Annotated[float, _option("--top-p", "Draw from the likeliest that sum to X (1).", 0, 1)]
MinP = Annotated[float, _option("--min-p", "Draw from X times the likeliest up (0).", 0, 1)]
TopK = Annotated[int, _option("--top-k", "Draw from the N likeliest; 0 is all (0).", 0, 2**31 - 1, "N")]
XtcProbability = Annotated[float, _option("--xtc-probability", "How often only the last choice stays (0).", 0, 1)]
XtcThreshold = Annotated[float, _option("--xtc-threshold", "Probability that makes a choice (0.1).", 0, 0.5)]
Seed = Annotated[int | None, _option("--seed", "The same seed draws the same text.", 0, 2**63 - 1, "N")]


class Sampling(NamedTuple):
    """Values of the options; what is left out is as in mlx-lm."""

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None

    def check(self) -> None:
        """Raise InputError for values that say nothing together."""
        from mlxkv.errors import InputError

        if 0 < self.temp < 0.01:  # which overflows in float16
            raise InputError(f"--temp {self.temp:g} is neither 0 nor 0.01 to 100")
        for name in ("top_p", "min_p", "top_k", "xtc_probability"):
            if not self.temp and getattr(self, name) != self._field_defaults[name]:
                option = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{option} needs a --temp above 0: at 0 the likeliest token is taken", "such as --temp 0.7"
                )

    def make(self, tokenizer: Any) -> Callable[..., Any]:
        """Seed MLX's random numbers if a seed was given, and return a sampler for mlx-lm."""
        import mlx.core as mx
        from mlx_lm.sample_utils import make_sampler

        if self.seed is not None:
            mx.random.seed(self.seed)
        return make_sampler(
            self.temp,
            self.top_p,
            self.min_p,
            top_k=self.top_k if self.top_k < tokenizer.vocab_size else 0,  # mlx-lm refuses to choose among all
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        )

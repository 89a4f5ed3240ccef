"""Base class of evaluations: the samples that one draws, and the records that it makes of each.

Every file of mlxkv/evaluate/tasks/ is an evaluation.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mlxkv.config import Config
from mlxkv.errors import InputError
from mlxkv.evaluate.variants import Variant
from mlxkv.registry import Registry

Record = dict[str, Any]


@dataclass(frozen=True)
class EvalSample:
    """One sample of an evaluation.

    Parameters
    ----------
    key
        Facts that identify the sample, in every record of it; the seed is among them only where the sample depends on
        it.
    measure
        Takes a model, its tokenizer and variants, and returns a record for each variant, in order; the first variant is
        the untouched cache.
    group
        Name of the samples that belong together, such as a task's; a limit counts in each group. Empty for one group.
    """

    key: Record
    measure: Callable[[Any, Any, Sequence[Variant]], list[Record]]
    group: str = ""


class Evaluation(ABC):
    """One evaluation with its options. Register the class with `evaluations`; its docstring is the command's help.

    Parameters
    ----------
    options
        An object of `options_class`.

    Raises
    ------
    InputError
        When the options are those of another evaluation.

    Attributes
    ----------
    options_class
        A frozen dataclass whose fields are made by `option`; they become the options of `mlxkv eval NAME`.
    scores
        The numbers of a record that tables show, as means over samples; the first one is compared with the baseline's.

    Examples
    --------
    >>> from mlxkv.evaluate.variants import iter_variants
    >>> @dataclass(frozen=True)
    ... class SizeOptions(Config):
    ...     length: int = option(8, "tokens in the cache", least=1)
    >>> class Size(Evaluation):
    ...     '''Bytes of a cache.'''
    ...
    ...     options_class, scores = SizeOptions, ("cache_bytes",)
    ...
    ...     def samples(self, tokenizer, seed):
    ...         def measure(model, tokenizer, variants):
    ...             caches = iter_variants(model, variants, list(range(self.options.length)))
    ...             return [{"variant": variant.name, **cached.sizes} for variant, cached in caches]
    ...
    ...         return [EvalSample({"length": self.options.length}, measure)]
    >>> Size(SizeOptions(length=5)).samples(None, seed=0)[0].key
    {'length': 5}
    """

    options_class: ClassVar[type[Config]]
    scores: ClassVar[tuple[str, ...]]

    def __init__(self, options: Config) -> None:
        if type(options) is not self.options_class:
            raise InputError(f"expected {self.options_class.__name__}, not {options!r}")
        self.options = options

    @abstractmethod
    def samples(self, tokenizer: Any, seed: int) -> list[EvalSample]:
        """Return the samples of a seed.

        Parameters
        ----------
        tokenizer
            The model's, as `mlxkv.lm.load` returns it.
        seed
            0 or more; an evaluation that draws nothing at random returns the same samples for every seed.

        Returns
        -------
        list of EvalSample
            1 or more samples.

        Raises
        ------
        InputError
            For a text or length that is too short.
        FormatError
            For files that are damaged.
        MlxkvError
            When a package that the scores need is missing.
        """


def _check_evaluation(evaluation: type[Evaluation]) -> None:
    if not (isinstance(evaluation, type) and issubclass(evaluation, Evaluation)):
        raise InputError(f"{evaluation!r} is no Evaluation")


evaluations: Registry[type[Evaluation]] = Registry(
    "evaluation", "mlxkv.evaluate.tasks", "mlxkv.evaluations", _check_evaluation
)


def option(default: Any, text: str, *, least: float | None = None) -> Any:
    """Make a field for the options of an evaluation.

    Parameters
    ----------
    default
        The default; `dataclasses.MISSING` for an option that has to be given. Values are of its type; with None or MISSING
        they are a Path, or a number where there is a smallest one. A tuple is given with commas on the command line.
    text
        Help of the command line, without a capital at the start and a full stop at the end.
    least
        The smallest number allowed; of a tuple, whose items are then all checked, there has to be one item or more.

    Returns
    -------
    dataclasses.Field
        For the body of a `Config`.

    Raises
    ------
    InputError
        When options are made with a value of another type, with a smaller number, or with an empty tuple.

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class LengthOptions(Config):
    ...     length: int = option(512, "tokens of the text", least=1)
    >>> LengthOptions(length=0)
    Traceback (most recent call last):
        ...
    mlxkv.errors.InputError: length must be 1 or more, not 0
    """
    items = default if isinstance(default, tuple) else (default,)
    kind = int if least is not None else Path
    if items and items[0] is not None and items[0] is not dataclasses.MISSING:
        kind = type(items[0])
    wanted = (
        f"a tuple, each item {_NAMES.get(kind, kind.__name__)}"
        if isinstance(default, tuple)
        else _NAMES.get(kind, kind.__name__)
    )

    def check(name: str, value: Any) -> None:
        if default is None and value is None:
            return
        numbers = value if isinstance(value, tuple) else (value,)
        if isinstance(value, tuple) is not isinstance(default, tuple) or not all(_is_a(kind, item) for item in numbers):
            raise InputError(f"{name} must be {wanted}, not {str(value)[:80]!r}")
        if least is not None and (not numbers or any(number < least for number in numbers)):
            raise InputError(f"{name} must be {least:g} or more, not {value}")

    return dataclasses.field(default=default, metadata={"help": text, "check": check})


_NAMES: dict[type, str] = {int: "a whole number", float: "a finite number", str: "text", Path: "a Path", bool: "a bool"}


def _is_a(kind: type, value: object) -> bool:
    """Check the type of an option's value; whole numbers are numbers too, and a bool is neither."""
    if kind is float:
        return type(value) in (int, float) and -math.inf < value < math.inf  # type: ignore[operator]
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)

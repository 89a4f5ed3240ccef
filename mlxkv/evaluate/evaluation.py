"""An evaluation: the samples that it draws, and what is recorded of each. Every file of mlxkv/evaluate/tasks/ is one."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        Facts that tell the sample from others, in every record of it; the seed is among them only where the sample
        depends on it.
    measure
        Takes a model, its tokenizer and variants, and returns a record for each variant, in order; the first variant is
        the untouched cache.
    group
        Name of alike samples, such as a task's; a limit counts in each group.
    """

    key: Record
    measure: Callable[[Any, Any, Sequence[Variant]], list[Record]]
    group: str = ""


class Evaluation(ABC):
    """One evaluation with its options. Register the class with `evaluations`; its docstring is the command's help.

    Attributes
    ----------
    options_class
        A frozen dataclass whose fields are made by `option`; they become the options of `mlxkv eval NAME`.
    scores
        The numbers of a record that tables show, as means over samples; the first one is compared with the baseline's.
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

        Raises
        ------
        InputError
            For a text or length that is too short.
        FormatError
            For files that are damaged.
        """


evaluations: Registry[type[Evaluation]] = Registry("evaluation", "mlxkv.evaluate.tasks", "mlxkv.evaluations")


def option(default: Any, text: str, *, least: float | None = None) -> Any:
    """Return a field of options.

    Parameters
    ----------
    default
        `dataclasses.MISSING` for an option that has to be given.
    text
        What the command line says about it.
    least
        The smallest number allowed, of each number where there are several; there has to be one.
    """

    def check(name: str, value: Any) -> None:
        numbers = value if isinstance(value, tuple) else (value,)
        if least is not None and (not numbers or any(number < least for number in numbers)):
            raise InputError(f"{name} must be {least:g} or more, not {value}")

    return dataclasses.field(default=default, metadata={"help": text, "check": check})

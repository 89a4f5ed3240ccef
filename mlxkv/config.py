"""Settings that check themselves: frozen dataclasses whose fields say what they may hold.

A field has a name for people and, where files have long had another, a `key` for TOML presets and headers.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mlxkv.errors import InputError

Check = Callable[[str, Any], None]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all settings. Fields made by `integer`, `number` and `choice` are checked when an object is made.

    Raises
    ------
    InputError
        When a field holds what it may not; the message says what it may.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                check(field.name, getattr(self, field.name))

    @classmethod
    def stored_keys(cls) -> dict[str, str]:
        """Return the key that files have for each field, by the field's name."""
        return {field.name: field.metadata.get("key") or field.name for field in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by the keys that files have."""
        return {key: getattr(self, name) for name, key in self.stored_keys().items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the inverse of `to_dict`.

        Raises
        ------
        InputError
            For keys that are missing or unknown, and for values that may not be.
        """
        names = {key: name for name, key in cls.stored_keys().items()}
        if unknown := [key for key in data if key not in names]:
            raise InputError(f"unknown keys {', '.join(map(str, unknown))}; the keys are {', '.join(names)}")
        try:
            return cls(**{names[key]: value for key, value in data.items()})
        except TypeError as error:
            raise InputError(f"missing keys ({error}); the keys are {', '.join(names)}") from None

    def replace(self, **changes: Any) -> Self:
        """Return the same settings with some changed; a file's key for a field is an old name of it, and warns.

        Raises
        ------
        InputError
            For names that are not there, and for values that may not be.
        """
        keys = self.stored_keys()
        old = {key: name for name, key in keys.items() if key != name and key not in keys}
        if unknown := [name for name in changes if name not in keys and name not in old]:
            raise InputError(f"unknown settings {', '.join(unknown)}; there are {', '.join(keys)}")
        for name in changes.keys() & old.keys():
            warnings.warn(f"the setting {name} is called {old[name]} now", DeprecationWarning, stacklevel=3)
        return dataclasses.replace(self, **{old.get(name, name): value for name, value in changes.items()})


def is_int(value: object, least: int = 0) -> bool:
    """Return whether a value read from somewhere is an int (not a bool) of at least `least`."""
    return type(value) is int and value >= least


def integer(default: int | None, least: int = 0, *, key: str | None = None) -> Any:
    """Return a field for a whole number of at least `least`; where the default is None, None is allowed too."""

    def check(name: str, value: Any) -> None:
        if not is_int(value, least) and not (default is None and value is None):
            raise InputError(f"{name} must be {least} or more, not {value!r}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key})


def number(
    default: Any = dataclasses.MISSING, *, above: float | None = None, least: float | None = None, most: float | None = None,
    below: float | None = None, key: str | None = None,
) -> Any:  # fmt: skip
    """Return a field for a finite number within bounds; where the default is None, None is allowed too.

    Without a default the field has to be given.
    """
    bounds = [("more than", above), ("at least", least), ("at most", most), ("less than", below)]
    allowed = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None) or "a number"

    def check(name: str, value: Any) -> None:
        if default is None and value is None:
            return
        fits = type(value) in (int, float) and math.isfinite(value)
        fits = fits and (above is None or value > above) and (least is None or value >= least)
        if not fits or (most is not None and value > most) or (below is not None and value >= below):
            raise InputError(f"{name} must be {allowed}, not {value!r}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key})


def choice(default: Any, options: Iterable[Any], *, key: str | None = None) -> Any:
    """Return a field for one of some values."""
    known = tuple(options)

    def check(name: str, value: Any) -> None:
        if value not in known or type(value) is not type(known[known.index(value)]):
            raise InputError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key})

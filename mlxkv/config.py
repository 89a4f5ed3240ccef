"""Settings as frozen dataclasses whose fields define the allowed values, which are checked on construction.

A field may have a `key`: its name in TOML presets and headers, where that differs from the field's name in Python.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mlxkv.errors import InputError, suggest
from mlxkv.spec import is_int

Check = Callable[[str, Any], None]
MAX_INTEGER = 2**30  # of a setting: sums of two stay within MLX's 32-bit sizes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all settings: fields made by `integer`, `number` and `choice` are checked when an object is made.

    Raises
    ------
    InputError
        When a field has a value that is not allowed; the message says which values are.

    Examples
    --------
    >>> @dataclass(frozen=True, kw_only=True)
    ... class WindowConfig(Config):
    ...     recent: int = integer(512, least=1, key="window")
    >>> WindowConfig(recent=0)
    Traceback (most recent call last):
        ...
    mlxkv.errors.InputError: recent must be 1 or more, not 0
    >>> WindowConfig().to_dict()
    {'window': 512}
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if check := field.metadata.get("check"):
                check(field.name, getattr(self, field.name))

    @classmethod
    def stored_keys(cls) -> dict[str, str]:
        """Return the key of each field in files.

        Returns
        -------
        dict of str to str
            Keys of TOML presets and headers, by the fields' names.
        """
        return {field.name: field.metadata.get("key") or field.name for field in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Return the settings by their keys in files.

        Returns
        -------
        dict
            Plain JSON values by key, defaults included.
        """
        return {key: getattr(self, name) for name, key in self.stored_keys().items()}

    @classmethod
    def from_saved(cls, data: Mapping[str, Any]) -> Self:
        """Make settings from the header of a file; missing keys are settings that there were not when it was written.

        Parameters
        ----------
        data
            The output of `to_dict`, perhaps of an earlier version.

        Returns
        -------
        Config
            The settings that have the effect of the earlier version's.

        Raises
        ------
        InputError
            As `from_dict`.
        """
        fields = dataclasses.fields(cls)
        absent = {field.metadata.get("key") or field.name: field.metadata.get("absent") for field in fields}
        return cls.from_dict({**{key: value for key, value in absent.items() if value is not None}, **data})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Make settings from the output of `to_dict` or from a TOML preset; missing keys mean defaults.

        Parameters
        ----------
        data
            Values by the keys that files have.

        Returns
        -------
        Config
            The settings, checked.

        Raises
        ------
        InputError
            For unknown keys, for missing ones that have no default, and for values that are not allowed.
        """
        names = {key: name for name, key in cls.stored_keys().items()}
        if unknown := [key for key in data if key not in names]:
            raise InputError(f"unknown keys {', '.join(map(str, unknown))[:200]}; the keys are {', '.join(names)}")
        try:
            return cls(**{names[key]: value for key, value in data.items()})
        except TypeError as error:
            raise InputError(f"missing keys ({error}); the keys are {', '.join(names)}") from None

    def replace(self, **changes: Any) -> Self:
        """Return the same settings with some of them changed.

        Parameters
        ----------
        **changes
            New values by field name. A field's key in files was its name once: it is taken too, with a
            DeprecationWarning.

        Returns
        -------
        Config
            The settings, checked.

        Raises
        ------
        InputError
            For unknown names, for a setting that is given under both its names, and for values that are not allowed.
        """
        keys = self.stored_keys()
        renamed = {key: name for name, key in keys.items() if key != name and key not in keys}
        if unknown := [name for name in changes if name not in keys and name not in renamed]:
            raise InputError(f"unknown settings {', '.join(unknown)}", suggest(unknown[0], keys))
        for old in changes.keys() & renamed.keys():
            if renamed[old] in changes:
                raise InputError(f"{renamed[old]} is given twice, once by its old name {old}")
            warnings.warn(
                f"the setting {old} is called {renamed[old]} now", DeprecationWarning, stacklevel=_levels_to_caller()
            )
        return dataclasses.replace(self, **{renamed.get(name, name): value for name, value in changes.items()})


def integer(
    default: int | None, least: int = 0, *, most: int = MAX_INTEGER, key: str | None = None, absent: int | None = None
) -> Any:
    """Make a field for a whole number.

    Parameters
    ----------
    default
        The default; where it is None, None is allowed too.
    least
        The smallest number allowed.
    most
        The largest number allowed.
    key
        The field's name in TOML presets and headers, where it is another one.
    absent
        Value in effect in files that were saved before there was this setting; None for the default.

    Returns
    -------
    dataclasses.Field
        For the body of a `Config`.

    Raises
    ------
    InputError
        When a config is made with another value.
    """

    def check(name: str, value: Any) -> None:
        if default is None and value is None:
            return
        if not is_int(value, least):
            raise InputError(f"{name} must be {least} or more, not {repr(value)[:80]}")
        if value > most:
            raise InputError(f"{name} must be at most {most}, not {value}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key, "absent": absent})


def number(
    default: Any = dataclasses.MISSING, *, above: float | None = None, least: float | None = None, most: float | None = None,
    below: float | None = None, key: str | None = None,
) -> Any:  # fmt: skip
    """Make a field for a finite number.

    Parameters
    ----------
    default
        The default; where it is None, None is allowed too. Without a default the field has to be given.
    above, least
        Lower bounds: exclusive, and inclusive. None for no bound.
    most, below
        Upper bounds: inclusive, and exclusive. None for no bound.
    key
        The field's name in TOML presets and headers, where it is another one.

    Returns
    -------
    dataclasses.Field
        For the body of a `Config`.

    Raises
    ------
    InputError
        When a config is made with another value.
    """
    bounds = [("more than", above), ("at least", least), ("at most", most), ("less than", below)]
    allowed = " and ".join(f"{words} {bound:g}" for words, bound in bounds if bound is not None) or "a number"

    def check(name: str, value: Any) -> None:
        if default is None and value is None:
            return
        # Comparing is safe for any int; MLX takes none beyond 64 bits, and a float has all up to 2^53.
        fits = type(value) in (int, float) and abs(value) <= (2**53 if type(value) is int else sys.float_info.max)
        fits = fits and (above is None or value > above) and (least is None or value >= least)
        if not fits or (most is not None and value > most) or (below is not None and value >= below):
            raise InputError(f"{name} must be {allowed}, not {repr(value)[:80]}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key})


def choice(default: Any, options: Iterable[Any], *, key: str | None = None, absent: Any = None) -> Any:
    """Make a field for one of some values.

    Parameters
    ----------
    default
        The default.
    options
        All values allowed; for a dict, its keys.
    key
        The field's name in TOML presets and headers, where it is another one.
    absent
        Value in effect in files that were saved before there was this setting; None for the default.

    Returns
    -------
    dataclasses.Field
        For the body of a `Config`.

    Raises
    ------
    InputError
        When a config is made with another value.
    """
    known = tuple(options)

    def check(name: str, value: Any) -> None:
        if value not in known or type(value) is not type(known[known.index(value)]):
            raise InputError(f"{name} must be one of {', '.join(map(str, known))}, not {repr(value)[:80]}")

    return dataclasses.field(default=default, metadata={"check": check, "key": key, "absent": absent})


def _levels_to_caller() -> int:
    """Return the stack level, for a warning in the function that asks, of the first caller outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "mlxkv":
        level, frame = level + 1, frame.f_back
    return level

"""Registries of methods, evaluations and commands by name. Each file adds one; other packages can add more.

Every file of a kind's folder is imported when a name is first asked for, and so is every installed package that
announces itself under the kind's entry point group; each registers its own objects. A name read
from a file is only looked up, so no file can cause an import.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from mlxkv.errors import InputError, suggest

T = TypeVar("T")
METHOD_GROUP = "mlxkv.methods"


class Registry(Generic[T]):
    """All things of one kind, by name.

    Parameters
    ----------
    kind
        Noun for messages, such as "live method".
    folder
        The package whose modules register such things; modules whose names begin with an underscore are passed over.
    group
        The entry point group of packages outside mlxkv that add such things, None where they cannot. A package that
        cannot be loaded is left out with a RuntimeWarning.
    check
        Called with each object to register; raises InputError for objects of another kind.

    Examples
    --------
    >>> shapes: Registry[type] = Registry("shape", "mlxkv.errors")
    >>> @shapes.register("round")
    ... class Round: ...
    >>> shapes.names()
    ['round']
    >>> shapes.name_of(Round)
    'round'
    """

    def __init__(
        self, kind: str, folder: str, group: str | None = None, check: Callable[[T], None] | None = None
    ) -> None:
        self.kind, self.folder, self.group = kind, folder, group
        self._check = check
        self._things: dict[str, T] = {}
        self._loaded = self._folder_loaded = False
        self._lock = threading.RLock()

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that adds a class, function or object under a name.

        Parameters
        ----------
        name
            Name for users and files.

        Returns
        -------
        Callable
            Adds what it is given and returns it unchanged. It raises InputError when something else has the name.

        Raises
        ------
        InputError
            When something else has the name, or when `check` refuses the thing.
        """

        def add(thing: T) -> T:
            if not str(getattr(thing, "__module__", "")).startswith("mlxkv."):
                self._load_folder()  # so that a package outside cannot take a name of ours
            if self._check is not None:
                self._check(thing)
            taken = self._things.get(name)
            if taken is not None and _identity(taken) != _identity(thing):
                raise InputError(f"there are two {self.kind}s of the name {name!r}: {taken!r} and {thing!r}")
            self._things[name] = thing
            return thing

        return add

    def names(self) -> list[str]:
        """Return all names, sorted.

        Returns
        -------
        list of str
            The names.
        """
        self._load()
        return sorted(self._things)

    def find(self, name: object) -> T | None:
        """Return the thing of that name; imports nothing because of the name.

        Parameters
        ----------
        name
            Any object, for example a value from a header.

        Returns
        -------
        T or None
            None when nothing has that name.
        """
        self._load()
        return self._things.get(name) if isinstance(name, str) else None

    def get(self, name: str) -> T:
        """Return the thing of that name.

        Parameters
        ----------
        name
            A name under which something is registered.

        Returns
        -------
        T
            The thing.

        Raises
        ------
        InputError
            When nothing has that name; the message names those that are near.
        """
        found = self.find(name)
        if found is None:
            raise InputError(f"no {self.kind} {str(name)[:80]!r}", suggest(name, self.names()))
        return found

    def name_of(self, thing: T) -> str:
        """Return the name under which a thing is registered.

        Parameters
        ----------
        thing
            A registered thing.

        Returns
        -------
        str
            Its name.

        Raises
        ------
        InputError
            When it is not registered.
        """
        for name, registered in self.items():
            if registered is thing:
                return name
        raise InputError(f"{thing!r} is no registered {self.kind}")

    def items(self) -> Iterator[tuple[str, T]]:
        """Return names and things, sorted by name.

        Returns
        -------
        Iterator of (str, T)
            The pairs.
        """
        self._load()
        return iter(sorted(self._things.items()))

    def _load(self) -> None:
        """Import the folder and the entry points, once; other threads wait for it."""
        with self._lock:
            self._load_folder()
            if self._loaded:
                return
            self._loaded = True  # first: a package may ask for names while it is imported
            for entry in entry_points(group=self.group) if self.group else ():
                try:
                    entry.load()
                except (Exception, SystemExit) as error:  # noqa: BLE001  # another package's mistakes must not stop ours
                    warnings.warn(
                        f"{entry.value} of group {self.group} is left out: {error!r}", RuntimeWarning, stacklevel=2
                    )

    def _load_folder(self) -> None:
        """Import our own files, once; a failed import is tried again the next time."""
        with self._lock:
            if self._folder_loaded:
                return
            self._folder_loaded = True  # first: a file may ask for names while it is imported
            try:
                package = importlib.import_module(self.folder)
                for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
                    if not module.name.startswith("_"):
                        importlib.import_module(f"{self.folder}.{module.name}")
            except BaseException:
                self._folder_loaded = False
                raise


def _identity(thing: object) -> tuple[object, object]:
    """Return the part of an object's identity that survives a second import of its module."""
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", thing)

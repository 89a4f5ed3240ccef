"""mlx_lm without its first second: the package is there at once, and runs its own start when anything of it is used.

`mlx_lm/__init__.py` imports Transformers, which no model class and no cache needs.
"""

from __future__ import annotations

import sys
import threading
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_NAME = "mlx_lm"
_lock = threading.RLock()


class _DeferredPackage(ModuleType):
    """A package whose modules can be imported, and whose own code runs when a name is missing."""

    def __getattr__(self, name: str) -> Any:
        with _lock:
            if type(self) is _DeferredPackage:
                self.__class__ = ModuleType  # type: ignore[assignment]  # first: its own code asks for names, too
                try:
                    assert self.__spec__ is not None
                    assert self.__spec__.loader is not None
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self.__class__ = _DeferredPackage
                    raise
        return getattr(self, name)


def defer_mlx_lm() -> None:
    """Make `mlx_lm` a package that runs its own code on first use, where nothing has imported it yet.

    For processes that only look at models: `import mlx_lm`, its names and its modules work as always.
    """
    with _lock:
        if _NAME in sys.modules or (spec := find_spec(_NAME)) is None:
            return
        package = module_from_spec(spec)
        package.__class__ = _DeferredPackage
        sys.modules[_NAME] = package

"""Transformer Engine as far as a run on the CPU meets it: norms and optimizers with its signatures, in plain torch.

megatron-core imports much else of it without using it there: all of that is empty modules and empty classes.
"""

import importlib
import importlib.abc
import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "1.0.0"


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes the modules of this package that there is no file for."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__dict__["__getattr__"] = anything_in(spec.name)
        return module

    def exec_module(self, module: ModuleType) -> None: ...


class Attributes(type):
    """Of an empty class: None, but for what Python itself asks."""

    def __getattr__(cls, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def anything_in(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an empty class for Anything, a module for anything."""
    return partial(_find, module)


def _find(module: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{module}.{name}") if name.islower() else Attributes(name, (), {})


__getattr__ = anything_in(__name__)
sys.meta_path.append(Empty())

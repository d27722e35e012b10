"""Which implementations an operation has, which can run here, and which one ``auto`` takes.

Tests, benchmarks and ``doctor`` walk this table; a new kernel is a new row.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sep.errors import UserError


class BackendError(UserError):
    """A backend was asked for by name and is unknown or cannot run here."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation."""

    name: str
    target: str
    """``module:function``, imported at first use."""
    missing: Callable[[str], str | None]
    """Why it cannot run on a device type ("cpu", "cuda"); None if it can."""
    automatic: Callable[[str], bool] = lambda _device: True
    """May ``auto`` take it on this device type?"""

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        module, function = self.target.split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations, the fastest first; the last is the plain torch reference."""

    name: str
    implementations: tuple[Implementation, ...]

    def choose(self, backend: str, device: str) -> str:
        """The name of the implementation to run; "auto" takes the first that can. Raises BackendError."""
        if backend == "auto":
            return next(i.name for i in self.implementations if i.automatic(device) and i.missing(device) is None)
        named = {i.name: i for i in self.implementations}
        if backend not in named:
            raise BackendError(f"{self.name}: backend {backend!r} is unknown; choose auto, {', '.join(named)}")
        reason = named[backend].missing(device)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {backend!r} cannot run here: {reason}; backend='auto' can")
        return backend

    def load(self, name: str) -> Callable[..., Any]:
        """The implementation of that name."""
        return next(i for i in self.implementations if i.name == name).load()


def triton_missing(device: str) -> str | None:
    """Why Triton kernels cannot run on this device type."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device}, Triton needs CUDA (or TRITON_INTERPRET=1, slow)"
    return None


def _everywhere(_device: str) -> None:
    return None


def _on_cuda(device: str) -> bool:
    return device == "cuda"


_SEP_ATTENTION = "megatron_sep.kernels.sep_attention"
_SEP_DECODE = "megatron_sep.kernels.sep_decode"
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "sep_attention",
            (
                Implementation("triton", f"{_SEP_ATTENTION}.triton:triton_attention", triton_missing, _on_cuda),
                Implementation("flex", f"{_SEP_ATTENTION}.flex:flex_sep_attention", _everywhere, lambda _: False),
                Implementation("reference", f"{_SEP_ATTENTION}.reference:reference_attention", _everywhere),
            ),
        ),
        Operation(
            "sep_decode",
            (
                Implementation("triton", f"{_SEP_DECODE}.triton:triton_decode", triton_missing, _on_cuda),
                Implementation("reference", f"{_SEP_DECODE}.reference:reference_decode", _everywhere),
            ),
        ),
    )
}


def choose(operation: str, backend: str, device: str) -> str:
    """The implementation's name for a backend and a device type; what "auto" takes is printed once."""
    name = OPERATIONS[operation].choose(backend, device)
    if backend == "auto" and (operation, device) not in _announced:
        _announced.add((operation, device))
        if os.environ.get("RANK", "0") == "0":
            print(f"{operation}: {name} on {device}", file=sys.stderr)
    return name


_announced: set[tuple[str, str]] = set()

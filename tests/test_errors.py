"""What is told to a user in a message, and what is left a traceback."""

import errno
import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator

import pytest

import megatron_sep
from megatron_sep.errors import EndedError, RunFailure, SepError, UserError, of_the_system

NO_DEPENDENCIES = ("apex", "transformer_engine")
"""Packages that some modules are made for and a test environment need not have."""


def error_classes() -> Iterator[type[BaseException]]:
    """Every class of error that a module of the package defines."""
    for found in pkgutil.walk_packages(megatron_sep.__path__, "megatron_sep."):
        if found.name == "megatron_sep.__main__":  # it runs the program
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name in NO_DEPENDENCIES:
                continue
            raise
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, BaseException) and kind.__module__ == found.name:
                yield kind


def test_every_error_of_the_package_is_told_in_a_message() -> None:
    """Each derives from one of those that say whose fault it is, or that it is nobody's, and says what it is of."""
    found = set(error_classes())
    assert len(found) > 20
    assert [kind for kind in found - {SepError} if not issubclass(kind, UserError | RunFailure | EndedError)] == []
    assert [kind for kind in found if not kind.__doc__] == []


def test_exit_codes_say_whose_fault_it_is() -> None:
    """2: what was asked for; 1: what failed while it ran; 75 and 130: it was asked to end, and goes on later."""
    assert {kind.exit_code for kind in error_classes() if issubclass(kind, UserError)} == {2}
    assert {kind.exit_code for kind in error_classes() if issubclass(kind, RunFailure)} == {1}
    ended = {kind for kind in error_classes() if issubclass(kind, EndedError) and kind is not EndedError}
    assert {kind.__name__: kind.exit_code for kind in ended} == {"StoppedError": 75, "InterruptedRunError": 130}


@pytest.mark.parametrize(
    ("number", "kind", "way_out"),
    [
        (errno.ENOENT, UserError, "look for a mistake in the path"),
        (errno.EACCES, UserError, "let yourself read and write there"),
        (errno.EISDIR, UserError, "a file is needed there"),
        (errno.ENOTDIR, UserError, "a part of the path is a file"),
        (errno.EEXIST, UserError, "move away what is there"),
        (errno.ELOOP, UserError, "choose another path"),
        (errno.ENOSPC, RunFailure, "free space there"),
        (errno.EIO, RunFailure, "look after it"),
    ],
)
def test_the_system_s_errors_name_path_cause_and_way_out(number: int, kind: type[SepError], way_out: str) -> None:
    """A full or broken disk is a failure of the run, all else a mistake in what was asked for."""
    found = of_the_system(OSError(number, os.strerror(number), "/some/path"))
    assert type(found) is kind
    assert str(found).startswith(f"/some/path: {os.strerror(number)}; ")
    assert way_out in str(found)


def test_a_rename_names_both_its_ends() -> None:
    """Either may be what is wrong."""
    found = of_the_system(OSError(errno.EISDIR, "Is a directory", "/here", None, "/there"))
    assert str(found).startswith("/here to /there: Is a directory; ")


def test_an_error_that_names_no_path_is_no_mistake_of_a_user() -> None:
    """A peer that is gone, or an OSError that a library made up."""
    assert of_the_system(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert of_the_system(OSError("made up")) is None
    assert of_the_system(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None

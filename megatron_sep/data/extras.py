"""Libraries of the extras: an import that fails says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sep.errors import UserError


class MissingLibraryError(UserError, ImportError):
    """A library of an extra that is not installed."""


@contextmanager
def needs_extra(library: str, extra: str) -> Iterator[None]:
    """Where ``library`` cannot be found inside the block, raise MissingLibraryError, naming the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:
            raise
        raise MissingLibraryError(f"{library} is not installed; pip install megatron_sep[{extra}]") from error

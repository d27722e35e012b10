"""Libraries of the ``data`` and ``sentencepiece`` extras: an import that fails says what to install."""

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sep.errors import UserError


class MissingLibraryError(UserError, ImportError):
    """A library of an extra that is not installed."""


@contextmanager
def needs_extra(library: str, extra: str) -> Iterator[None]:
    """Turn a failed import inside the block into an error that names the extra."""
    try:
        yield
    except ImportError as error:
        raise MissingLibraryError(f"{library} is not installed; pip install megatron_sep[{extra}]") from error

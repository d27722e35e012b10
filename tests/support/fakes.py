"""Stand-ins for packages that this project finds at run time and never needs."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

INSTALLED = Path(__file__).with_name("installed")


@contextlib.contextmanager
def installed(package: str) -> Iterator[None]:
    """Within it "apex" or "transformer_engine" can be imported; afterwards nothing of it is left."""
    before, path, finders = dict(sys.modules), list(sys.path), list(sys.meta_path)
    sys.path.insert(0, str(INSTALLED / f"with_{package}"))
    try:
        yield
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]

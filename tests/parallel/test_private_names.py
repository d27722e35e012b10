"""Names of libraries that nobody promised are still there: what is gone is said by its name."""

from functools import reduce
from importlib import import_module
from importlib.metadata import version

import pytest

from megatron_sep.parallel.core_versions import PRIVATE_NAMES

NAMES = [(library, name) for library, names in PRIVATE_NAMES.items() for name in names]


@pytest.mark.parametrize(("library", "name"), NAMES, ids=[name for _, name in NAMES])
def test_a_private_name_is_there(library: str, name: str) -> None:
    module, _, attributes = name.partition(":")
    try:
        reduce(getattr, attributes.split("."), import_module(module))
    except (ImportError, AttributeError) as gone:
        seen = PRIVATE_NAMES[library][name]
        pytest.fail(f"{name} is gone from {library} {version(library)}; it was seen in {seen}: {gone}")

"""For tests of what is chosen."""

from collections.abc import Iterator

import pytest

from megatron_sep.kernels import operation, registry


@pytest.fixture
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was chosen and said before is forgotten, and so is afterwards what the test chose."""
    monkeypatch.setattr(operation, "_announced", set())
    registry._load.cache_clear()
    yield
    registry._load.cache_clear()

"""Shared by all tests: one process group for the whole session, and small models."""

from collections.abc import Iterator

import pytest
import torch

from megatron_sep.config.schema import ParallelConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run `make gpu` on a machine with one"))


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """A job of one process with megatron-core's groups; torch runs single-threaded for speed at this size."""
    from megatron_sep.parallel.groups import process_groups

    with process_groups(ParallelConfig(), seed=1):
        yield

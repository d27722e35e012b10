"""A Ray cluster of two nodes on this machine, and whom a test may kill there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SITE = """
import importlib.abc, importlib.machinery, sys

class Small(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        values = {"readings": {"BLOCK_RECORDS": 4}, "ledger": {"_SECONDS": 0.0}, "pieces": {"_SECONDS": 0.0}}
        room, _, module = name.rpartition(".")
        if room != "megatron_sep.prepare" or module not in values:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda made: (run(made), vars(made).update(values[module]))
        return spec

sys.meta_path.insert(0, Small())
"""


@contextmanager
def two_nodes(folder: Path, environment: Callable[[int], dict[str, str]] = lambda _: {}) -> Iterator[Any]:
    """Of a core each, with variables of their own; every Python that starts below them reads small blocks.

    ``folder`` is for what makes it so. Processes that the block starts inherit it too.
    """
    from ray.cluster_utils import Cluster

    (folder / "sitecustomize.py").write_text(SITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
        patch.setenv("RAY_DISABLE_METRICS_COLLECTION", "1")
        patch.setenv("RAY_worker_niceness", "0")  # a machine that others use gives workers of Ray's own 15 no time
        head = {"num_cpus": 1, "include_dashboard": False, "env_vars": environment(0)}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes.add_node(num_cpus=1, env_vars=environment(1))
            yield nodes
        finally:
            nodes.shutdown()


def workers() -> list[psutil.Process]:
    """Ray's processes that run tasks, or wait for some."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "Agent" not in title:  # a node dies with its agents
                found.append(process)
        except psutil.Error:
            continue
    return found

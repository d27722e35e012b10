"""A Ray cluster of two nodes on this machine writes what one process writes, whoever is killed on the way."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from support.cases import full_run
from support.prepared import all_stages, corpus_of_all_kinds, same_files
from support.ray_cluster import two_nodes, workers

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.errors import RunFailure
from megatron_sep.prepare.prepare import prepare

pytest.importorskip("ray", reason="needs the extra ray; pip install megatron_sep[ray]")
pytest.importorskip("rensa")

KILLS = 20 if full_run() else 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with two_nodes(tmp_path_factory.mktemp("site")) as nodes:
        yield nodes


@pytest.fixture
def config(tmp_path: Path, tokenizer_path: Path) -> Path:
    """A YAML in which all stages are on, beside the shard ``whole`` of one process."""
    sources = corpus_of_all_kinds(tmp_path)
    settings: dict[str, Any] = {"tokenizer": TokenizerConfig(path=tokenizer_path), "sources": sources, "workers": 1}
    made = PrepareConfig(output=tmp_path / "whole", **settings, **all_stages(tmp_path, sources))
    prepare(made)
    path = tmp_path / "prepare.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    return path


Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(cluster: Any, config: Path) -> Iterator[Start]:
    """Starts a driver that writes to a name beside the configuration; none is left after the test."""
    drivers = []

    def started(output: str) -> subprocess.Popen[str]:
        words = ["prepare", str(config), f"output={config.parent / output}", "--on", f"ray://{cluster.address}"]
        command = [sys.executable, "-m", "megatron_sep", *words]
        drivers.append(subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.kill()
        driver.wait()


def goes_on(driver: subprocess.Popen[str], folder: Path) -> bool:
    """Wait until more is written; whether the driver is still at work then."""
    before = written(folder)
    while driver.poll() is None and written(folder) == before:
        time.sleep(0.02)
    return driver.poll() is None


def written(folder: Path) -> set[tuple[Path, int]]:
    """When each state of the work was written."""
    found = set()
    for path in folder.rglob("*.json"):
        with suppress(FileNotFoundError):
            found.add((path, path.stat().st_mtime_ns))
    return found


def test_whoever_is_killed_the_bytes_are_those_of_one_process(start: Start, config: Path) -> None:
    """SIGKILL for workers and drivers in turns, while something is written; a driver that is started again goes on."""
    generator = random.Random(0)
    output, kills, drivers = 0, 0, 0
    while kills < KILLS:
        output += 1
        driver, folder = start(f"ray{output}"), config.parent / f"ray{output}.work"
        while kills < KILLS and goes_on(driver, folder):
            time.sleep(generator.uniform(0, 0.5))
            victims = workers()
            if kills % 2 and driver.poll() is None:
                driver.kill()
                driver.wait()
                kills, drivers = kills + 1, drivers + 1
                driver = start(f"ray{output}")
            elif victims:
                generator.choice(victims).kill()
                kills += 1
        errors = driver.communicate(timeout=300)[1]
        assert driver.returncode == 0, errors
        same_files(config.parent / "whole", config.parent / f"ray{output}")
    assert drivers


@pytest.mark.skipif(not full_run(), reason="waits until Ray takes a node for dead; run with --full")
def test_a_node_that_is_lost_costs_time_alone(cluster: Any, start: Start, config: Path) -> None:
    """SIGKILL for all of a node's processes, in the middle of the first and of the second pass."""
    lost = {stage: cluster.add_node(num_cpus=1) for stage in ("scan", "encode")}
    driver = start("lost")
    for stage, node in lost.items():
        while driver.poll() is None and not any(config.parent.glob(f"lost.work/part-*/{stage}.json")):
            time.sleep(0.05)
        assert driver.poll() is None, "it ended before the node was lost"
        cluster.remove_node(node, allow_graceful=False)
    errors = driver.communicate(timeout=300)[1]
    assert driver.returncode == 0, errors
    same_files(config.parent / "whole", config.parent / "lost")


def test_what_ray_has_lost_is_said_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way to go on; what a task could not open keeps its path."""
    from ray.exceptions import RaySystemError, RayTaskError

    from megatron_sep.prepare import on_ray

    def raises(error: Exception) -> Callable[[object], None]:
        return Mock(side_effect=error)

    monkeypatch.setattr(on_ray.ray, "get", raises(RaySystemError("the object's owner is gone")))
    with pytest.raises(RunFailure, match=r"the Ray cluster lost .*owner is gone.*run again to go on where it stopped"):
        on_ray._result(None)
    missing = FileNotFoundError(2, "No such file or directory", "text.jsonl")
    monkeypatch.setattr(on_ray.ray, "get", raises(RayTaskError("f", "trace", missing)))
    with pytest.raises(FileNotFoundError, match=r"text\.jsonl"):
        on_ray._result(None)


def test_a_fault_in_the_text_comes_through(cluster: Any, config: Path) -> None:
    """As its own message, with file and line, and without Ray's traceback."""
    (config.parent / "text3.jsonl").write_text('{"text": "a"}\n{broken\n')
    (config.parent / "empty.jsonl").write_text('{"text": "b"}\n')
    words = [
        "prepare",
        str(config),
        f"output={config.parent / 'bad'}",
        "on_bad=fail",
        "--on",
        f"ray://{cluster.address}",
    ]
    done = subprocess.run([sys.executable, "-m", "megatron_sep", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "text3.jsonl, line 2: broken JSON" in done.stderr
    assert "Traceback" not in done.stderr

"""A Ray cluster whose nodes share no disk writes what one process writes, whoever is killed on the way."""

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bucket import served_bucket
from support.cases import full_run
from support.prepared import all_stages, corpus_of_all_kinds, same_files
from support.ray_cluster import two_nodes, workers

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.prepare.prepare import prepare

pytest.importorskip("ray", reason="needs the extra ray; pip install megatron_sep[ray]")
pytest.importorskip("rensa")
fsspec = pytest.importorskip("fsspec")

pytestmark = pytest.mark.skipif(not full_run(), reason="minutes of Ray's processes that start; run with --full")
KILLS = 12


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each node, and the last for the driver."""
    return [tmp_path_factory.mktemp(f"disk{number}") for number in range(3)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, disks: list[Path]) -> Iterator[Any]:
    """Two nodes, each with its own disk for what it fetches from a bucket."""
    site = tmp_path_factory.mktemp("site")
    with (
        pytest.MonkeyPatch.context() as patch,
        served_bucket(patch),
        two_nodes(site, lambda node: {"TMPDIR": str(disks[node])}) as nodes,
    ):
        yield nodes


@pytest.fixture
def driver(cluster: Any, disks: list[Path], tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a driver in a folder in which all paths are relative, so that no other process finds what they name."""
    home = disks[2]
    monkeypatch.chdir(home)
    sources = corpus_of_all_kinds(Path("text"))
    stages = all_stages(Path(), sources)
    fsspec.filesystem("s3").put("text/", "bucket/text/", recursive=True)
    moved = [
        source.model_copy(update={"paths": tuple(f"s3://bucket/{path}" for path in source.paths)}) for source in sources
    ]
    (home / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    tokenizer = TokenizerConfig(path=Path("tokenizer.json"))
    made = PrepareConfig(output=Path("whole"), tokenizer=tokenizer, sources=moved, workers=1, **stages)
    prepare(made)
    (home / "prepare.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json", exclude={"work"})))
    started: list[subprocess.Popen[str]] = []

    def start(output: str) -> subprocess.Popen[str]:
        words = ["prepare", "prepare.yaml", f"output={output}", "work.address=s3://bucket/work"]
        command = [sys.executable, "-m", "megatron_sep", *words, "--on", f"ray://{cluster.address}"]
        environment = {**os.environ, "TMPDIR": str(home)}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stderr=pipe, stdout=subprocess.DEVNULL, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def work_of(output: str) -> set[str]:
    """What lies in the store of it."""
    system = fsspec.filesystem("s3")
    system.invalidate_cache()
    return set(system.find(f"bucket/work/{output}.work")) - {f"bucket/work/{output}.work/lock.json"}


def goes_on(process: subprocess.Popen[str], output: str) -> bool:
    """Wait until there is more; whether the driver is still at work then."""
    before = work_of(output)
    while process.poll() is None and not work_of(output) - before:
        time.sleep(0.02)
    return process.poll() is None


def test_whoever_is_killed_the_bytes_are_those_of_one_process(driver: Any, disks: list[Path]) -> None:
    """SIGKILL for workers and drivers in turns, while something is put; in the end nothing of the work is left."""
    generator = random.Random(0)
    number, kills, drivers, used = 0, 0, 0, set()
    while kills < KILLS:
        number += 1
        output = f"ray{number}"
        process = driver(output)
        while kills < KILLS and goes_on(process, output):
            time.sleep(generator.uniform(0, 0.5))
            victims = workers()
            used |= {disk for disk in disks if any(disk.glob("megatron_sep-*"))}
            if kills % 2 and process.poll() is None:
                process.kill()
                process.wait()
                kills, drivers = kills + 1, drivers + 1
                process = driver(output)
            elif victims:
                generator.choice(victims).kill()
                kills += 1
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        used |= {disk for disk in disks if any(disk.glob("megatron_sep-*"))}
        same_files(disks[2] / "whole", disks[2] / output)
        assert not work_of(output)
        assert not [left for disk in disks for left in disk.glob("megatron_sep-*")]
    assert drivers
    assert len(used) > 1, "no two nodes had a disk of their own in use"


def test_a_node_that_is_lost_costs_time_alone(driver: Any, cluster: Any, disks: list[Path], tmp_path: Path) -> None:
    """SIGKILL for all of a node's processes in either pass, and its disk is gone with it."""
    lost = {}
    for stage in ("scan", "encode"):
        (tmp_path / stage).mkdir()
        lost[stage] = cluster.add_node(num_cpus=1, env_vars={"TMPDIR": str(tmp_path / stage)})
    process = driver("lost")
    for stage, node in lost.items():
        while process.poll() is None and not any(f"/{stage}." in name for name in work_of("lost")):
            time.sleep(0.05)
        assert process.poll() is None, "it ended before the node was lost"
        cluster.remove_node(node, allow_graceful=False)
        shutil.rmtree(tmp_path / stage)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    same_files(disks[2] / "whole", disks[2] / "lost")

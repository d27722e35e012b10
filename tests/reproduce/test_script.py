"""scripts/reproduce_runs.sh makes what `megatron_sep reproduce` reads, reproduce_reports.sh all that is made of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import full_run
from support.left_runs import VOCABULARY
from typer.main import get_command
from typer.testing import CliRunner

from megatron_sep.cli import app
from megatron_sep.reproduce.items import ITEMS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "reproduce_runs.sh"
REPORTS = ROOT / "scripts" / "reproduce_reports.sh"
WRITES_DOWN = """#!/usr/bin/env bash
printf '%s\\t' "$@" >>"$SAID"
echo >>"$SAID"
"""
"""In place of Python: what it was called with, a line each."""
SMALL = (
    "model.num_layers=2 model.hidden_size=32 model.num_attention_heads=2 model.sequence_length=128 train.steps=12 "
    "train.global_batch_size=4 train.micro_batch_size=4 train.precision=fp32 train.eval_every=3 train.eval_batches=1 "
    "checkpoint.every=8 metrics.every=2 'data.split=[0.8,0.2,0]'"
)


def called(folder: Path, words: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GPUS": "1"}
    return subprocess.run(
        ["bash", "-c", f"bash {script} {words}"], cwd=folder, env=os.environ | ours | environment,
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def test_the_script_knows_every_run(tmp_path: Path) -> None:
    """Left out, RUNS names every file of the folder that is a run; a name that is none is refused before anything."""
    text = SCRIPT.read_text()
    named = text[text.index("RUNS=${RUNS:-") :].split("}")[0].partition(":-")[2].split()
    files = {path.stem for path in (ROOT / "configs" / "reproduce").glob("*.yaml")} - {"base", "prepare"}
    assert set(named) == files
    assert len(named) == len(files)
    refused = called(tmp_path, "tokenizer.json text.jsonl", RUNS="vanilla other")
    assert refused.returncode == 2
    assert "RUNS: other: no other.yaml" in refused.stderr
    assert not list(tmp_path.iterdir())


def without_python(folder: Path) -> tuple[dict[str, str], Path]:
    """A folder to measure in, an environment where Python only writes down what it is called with, and where to."""
    path, said = folder / "bin", folder / "said.txt"
    for each in (path, folder / "books", folder / "tasks", folder / "runs" / "reproduce"):
        each.mkdir(parents=True)
    (folder / "books" / "1.txt").write_text("A book.")
    (path / "python").write_text(WRITES_DOWN)
    (path / "python").chmod(0o755)
    return {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "SAID": str(said)}, said


def test_reports_are_made_of_every_item(tmp_path: Path) -> None:
    """Each item that is made here is asked for, with options that the program takes; what is done is not done again."""
    surroundings, said = without_python(tmp_path)
    done = called(tmp_path, "books tasks", REPORTS, **surroundings)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\t")[:-1] for line in said.read_text().splitlines()]
    asked = set()
    for _, _, verb, *words in (call for call in calls if call[1] == "megatron_sep"):
        with get_command(app).commands[verb].make_context(verb, words) as context:
            asked |= set(context.params.get("items") or ())
    assert asked == {item.name for item in ITEMS if item.make}
    assert {Path(call[0]).name for call in calls if call[1] != "megatron_sep"} == {"compare_policies.py"}
    again = called(tmp_path, "books tasks", REPORTS, JOBS="table4 maps other", **surroundings)
    assert "table4: is done\nmaps: is done\n" in again.stdout
    assert "JOBS: other: no such measurement" in again.stderr
    assert len(said.read_text().splitlines()) == len(calls)


def test_other_weights_are_measured_anew(tmp_path: Path) -> None:
    """Of a run with another newest checkpoint; nothing else does that, and what was kept of the older is set aside."""
    surroundings, said = without_python(tmp_path)
    runs = tmp_path / "runs" / "reproduce"
    needle, tasks = runs / "vanilla" / "needle.json", runs / "sep-n64" / "tasks.json"

    def save(run: str, step: int, seal: str) -> None:
        checkpoint = runs / run / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "manifest.sha256").write_text(seal * 64)

    def measured() -> list[str]:
        said.write_text("")
        done = called(
            tmp_path,
            "books tasks",
            REPORTS,
            JOBS="needle-vanilla tasks-sep-n64 policies-vanilla table6",
            **surroundings,
        )
        assert done.returncode == 0, done.stderr
        jobs = {"needle.json": "needle", "tasks.json": "tasks", "policies.json": "policies", "16": "table6"}
        return sorted(jobs[Path(line.split("\t")[-2]).name] for line in said.read_text().splitlines())

    save("vanilla", 4, "0")
    save("vanilla", 8, "a")
    save("sep-n64", 8, "b")
    every = ["needle", "policies", "table6", "tasks"]
    needle.write_text('{"question": {}}')  # of a version that kept no weights
    parts = tasks.with_name("tasks.json.parts")
    parts.mkdir()
    (parts / "question.json").write_text("b" * 64)  # of a call that was killed
    assert measured() == every
    assert needle.with_name("needle.json.older").read_text() == '{"question": {}}'
    assert parts.is_dir()
    for file, seal in ((needle, "a"), (tasks, "b")):
        file.write_text(seal * 64)
    (runs / "vanilla" / "metrics.jsonl").write_text("")
    shutil.rmtree(runs / "vanilla" / "checkpoints" / "step-00000004")
    save("vanilla", 12, "c")
    (runs / "vanilla" / "checkpoints" / "step-00000012").rename(
        runs / "vanilla" / "checkpoints" / "step-00000012.partial"
    )
    assert measured() == []
    save("vanilla", 8, "d")
    assert measured() == ["needle", "policies", "table6"]
    assert needle.with_name("needle.json.older").read_text() == "a" * 64
    assert not needle.exists()
    assert tasks.exists()
    save("sep-n64", 12, "e")
    assert measured() == ["table6", "tasks"]


@pytest.mark.skipif(not full_run(), reason="trains three runs, a minute; run with --full")
def test_runs_are_trained_and_read(tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs from scratch and one post-trained; again, they are done; the figures are made of them."""
    sentence = "The cat sat, as cats do; the dog barked! Is this it?\n"
    lines = [json.dumps({"text": sentence * 20 + str(i)}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    start = "checkpoint.init_from=runs/reproduce/vanilla/checkpoints/step-00000008 checkpoint.init_step=8"
    small = f"{tokenizer_path} text.jsonl {SMALL} model.vocab_size={VOCABULARY}"
    for words, runs in ((small, "vanilla sep-n64"), (f"{small} {start}", "posttrain-n64"), (small, "vanilla")):
        done = called(tmp_path, words, RUNS=runs)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "is done: step 12 of 12" in done.stdout
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["reproduce", "figure5", "figure6", "table10", "--runs", "runs"])
    assert made.exit_code == 0, made.output
    assert "SepLLM n=64" in made.stdout
    assert {path.name for path in (tmp_path / "reports").glob("*.png")} == {"figure5.png", "figure6.png"}

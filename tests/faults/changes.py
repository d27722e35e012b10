"""F21 and F22: runs that go on with other settings, and those that an older version began."""

import json
import math
import shutil
from pathlib import Path

from faults.case import Times, Trial, WrongError, expect
from faults.killing import told
from faults.world import EXACT, lines, numbers

CHANGES: dict[str, tuple[str, ...]] = {
    "attention.window": ("attention.window=9", "attention.window=4"),
    "attention.sinks": ("attention.sinks=3",),
    "attention.separators": ("attention.separators=['.']", "attention.separators=[]"),
    "attention.full_layers": ("attention.full_layers=[1]", "attention.full_layers=[]"),
    "optimizer.lr": ("optimizer.lr=0.002", "optimizer.lr=5e-4"),
    "optimizer.betas": ("optimizer.betas=[0.9,0.99]",),
    "train.seed": ("train.seed=5",),
    "train.global_batch_size": ("train.global_batch_size=8",),
    "train.precision": ("train.precision=bf16",),
    "data.seed": ("data.seed=3",),
    "data.split": ("data.split=[0.5,0.5,0]",),
    "model.sequence_length": ("model.sequence_length=16",),
}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-of-format-1"


def another_setting(trial: Trial) -> Times:
    """A setting that changes what is learnt: refused with the words that allow it, and by these words it goes on."""
    run = trial.world.copy(trial.folder / "run")
    key = list(CHANGES)[trial.number % len(CHANGES)]
    setting = trial.random.choice(CHANGES[key])
    before = numbers(run)
    refused = trial.world.train(run, setting, "train.steps=13")
    if refused.code == 0 or numbers(run) != before:
        raise WrongError(f"{setting} was taken in silence: {refused.text[-300:]}")
    seconds = told(refused, 2, f"--allow-change {key}", "begun with other settings")
    allowed = trial.world.train(run, setting, "train.steps=13", "--allow-change", key)
    expect(allowed.code == 0, allowed.text[-300:])
    expect(f"{key}: " in allowed.text, f"does not say what has changed: {allowed.text[-300:]}")
    found = numbers(run)
    expect(found[:-1] == before and found[-1]["step"] == 13, found[-2:])
    _is_written_down(run, key)
    return Times(seconds)


def _is_written_down(run: Path, key: str) -> None:
    """In the history of the run, where this version keeps one."""
    history = run / "history.jsonl"
    expect(history.is_file(), "no history.jsonl")
    told_of = [line for line in history.read_text().splitlines() if key in line]
    expect(len(told_of) >= 2, f"{len(told_of)} lines of the history name {key}; one is of the refusal")


def older_version(trial: Trial) -> Times:
    """A run that version 0.1.0 began goes on with its data, rates and, but for rounding, losses."""
    run = trial.folder / "run"
    shutil.copytree(FIXTURE, run)
    paths = [f"tokenizer.path={run / 'tokenizer.json'}", f"data.path={run / 'corpus'}", "optimizer.decay_steps=8"]
    allowed = ["--allow-change", "data.path", "--allow-change", "tokenizer.path"]  # it has no sums of what lay there
    words = ["train", str(run / "run.yaml"), f"dir={run}", *paths, "checkpoint.keep=null", *allowed]
    from faults.verbs import call

    ended = call(trial.folder / "log", *words)
    expect(ended.code == 0, ended.text[-300:])
    expected = [
        line for line in map(json.loads, (FIXTURE / "after.jsonl").read_text().splitlines()) if "train/lr" in line
    ]
    found = [line for line in lines(run) if line["step"] > 4]
    expect(len(found) == len(expected) == 4, found)
    for one, other in zip(found, expected, strict=True):
        wrong = [key for key in EXACT if key in other and not math.isclose(one[key], other[key], rel_tol=1e-5)]
        if wrong:
            raise WrongError(f"step {one['step']}: {wrong} are not as in the older version")
    return Times()

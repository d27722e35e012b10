"""A run that goes on with other settings: what follows the step does so, what is kept is kept, and both are said."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sep.config import RunConfig
from megatron_sep.parallel.groups import topology
from megatron_sep.train.changes import ChangedError
from megatron_sep.train.history import History
from megatron_sep.train.schedule import LearningRate
from megatron_sep.train.written import read_history, read_jsonl
from megatron_sep.weights.sealed import finished_checkpoints

pytestmark = pytest.mark.usefixtures("single_process")


def build(config: RunConfig, *allowed: str) -> "Run":  # noqa: F821
    from megatron_sep.train.run import build_run

    return build_run(config, topology(), allowed)


def train(run: "Run") -> None:  # noqa: F821
    from megatron_sep.train.loop import train as loop

    loop(run)


def rates(config: RunConfig) -> dict[int, float]:
    lines = read_jsonl(config.dir / "metrics.jsonl")
    return {int(line["step"]): line["train/lr"] for line in lines if "train/lr" in line}


def windows_of(run: "Run") -> list[int | None]:  # noqa: F821
    """The window of layer 1 in each step that the run is trained for."""
    rules, found = run.train_data.rules, []

    def noted(step: int) -> object:
        found.append(rules(step).patterns[1].window)
        return rules(step)

    run.train_data.rules = noted
    train(run)
    return found


def test_annealing_follows_the_step_whatever_the_batch(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """32 to 8 in 8 steps, the second half of them with twice the sequences a step."""
    sections = {"attention": {"anneal": {"start": 32, "steps": 8}}, "optimizer": {"decay_steps": 8}}
    first = windows_of(build(tiny(**sections, train={"eval_every": 0, "steps": 4})))
    more = tiny(**sections, train={"eval_every": 0, "steps": 9, "global_batch_size": 16})
    second = windows_of(build(more, "train.global_batch_size"))
    assert first + second == [32, 32, 32, 32, 16, 16, 16, 16, 8]
    assert "from here on with other settings: train.global_batch_size: 8, now 16\n" in capsys.readouterr().out


def test_more_steps_leave_the_learning_rate_as_it_was_planned(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun for 8 steps, raised to 10 and to 12: the rate stays at its minimum from step 8 on, and it is said."""
    planned = LearningRate(tiny().optimizer, 8)
    for steps in (8, 10, 12):
        train(build(tiny(train={"steps": steps, "eval_every": 0})))
    assert rates(tiny()) == {step: pytest.approx(planned(step)) for step in range(1, 13)}
    said = capsys.readouterr().out
    assert "the learning rate falls until step 8, as this run was started; train.steps is now 12: set opt" in said
    assert "other settings" not in said


def test_a_schedule_that_is_asked_for_is_followed(
    tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """With optimizer.decay_steps set and allowed the run goes on under it, and the change is said."""
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    longer = tiny(train={"steps": 12, "eval_every": 0}, optimizer={"decay_steps": 12})
    train(build(longer, "optimizer"))
    planned = LearningRate(tiny().optimizer, 12)
    assert {s: r for s, r in rates(tiny()).items() if s > 4} == {s: pytest.approx(planned(s)) for s in range(5, 13)}
    assert "from here on with other settings: optimizer.decay_steps: 4, now 12" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"optimizer": {"lr": 2e-3}}, ["optimizer.lr"]),
        ({"train": {"seed": 5}}, ["train.seed"]),
        ({"train": {"global_batch_size": 4}}, ["train.global_batch_size"]),
        ({"attention": {"window": 9}}, ["attention.window"]),
        ({"attention": {"separators": ["."]}}, ["attention.separators"]),
        ({"data": {"seed": 3, "shuffle": False}}, ["data.seed", "data.shuffle"]),
        ({"model": {"sequence_length": 32}}, ["model.sequence_length"]),
    ],
)
def test_a_changed_setting_is_refused_until_it_is_allowed_by_name(
    tiny: Callable[..., RunConfig], sections: dict[str, Any], keys: list[str]
) -> None:
    """The message has both values, the checkpoint is not touched, and the words that it asks for let the run go on."""
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    other = tiny(**{**sections, "train": {"steps": 5, "eval_every": 0, **sections.get("train", {})}})
    with pytest.raises(ChangedError, match=rf"begun with other settings \({keys[0]}: .*, now ") as refused:
        build(other)
    for key in keys:
        assert f"--allow-change {key}" in str(refused.value)
    assert build(other, *keys).state.step == 4
    assert build(other, *{key.split(".")[0] for key in keys}).state.step == 4


def test_what_changes_no_weight_may_change(tiny: Callable[..., RunConfig]) -> None:
    """Micro-batches, validation, checkpoints, metrics and recomputation are as they are set."""
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    free = {"steps": 6, "micro_batch_size": 4, "eval_every": 2, "eval_batches": 1, "recompute": True}
    run = build(tiny(train=free, checkpoint={"every": 1, "keep": 2}, metrics={"every": 2}))
    assert run.state.step == 4


def test_data_may_move_and_may_not_change(
    tiny: Callable[..., RunConfig], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same content under another path passes without a word; other content asks, under the same path too."""
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    there = {"data": {"path": str(moved / "corpus")}, "tokenizer": {"path": str(moved / "tokenizer.json")}}
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    longer = tiny(train={"steps": 5, "eval_every": 0}, **there)
    assert build(longer).state.step == 4
    assert "other settings" not in capsys.readouterr().out
    tokens = bytearray((moved / "corpus.bin").read_bytes())
    tokens[100] ^= 1
    (moved / "corpus.bin").write_bytes(tokens)
    with pytest.raises(
        ChangedError, match=r"data\.path: .*corpus, now .*moved/corpus.*pass --allow-change data\.path$"
    ):
        build(longer)
    train(build(longer, "data.path"))
    tokens[200] ^= 1
    (moved / "corpus.bin").write_bytes(tokens)
    with pytest.raises(ChangedError, match=r"data\.path: .*moved/corpus holds something else than then"):
        build(tiny(train={"steps": 6, "eval_every": 0}, **there))


def test_a_run_of_an_older_version_is_compared_with_what_lies_where_it_was(
    tiny: Callable[..., RunConfig], corpus: Path, tmp_path: Path
) -> None:
    """Its checkpoint has no sums: the old path is read; where nothing is there any more, it asks."""
    old, moved = tmp_path / "old", tmp_path / "moved"
    shutil.copytree(corpus, old)
    shutil.copytree(corpus, moved)
    run = build(tiny(train={"steps": 4, "eval_every": 0}, data={"path": str(old / "corpus")}))
    run.contents = None
    train(run)
    longer = tiny(train={"steps": 5, "eval_every": 0}, data={"path": str(moved / "corpus")})
    assert build(longer).state.step == 4
    shutil.rmtree(old)
    with pytest.raises(ChangedError, match=r"data\.path: .*old/corpus, now .*moved/corpus"):
        build(longer)


def test_what_befell_a_run_is_written_down(tiny: Callable[..., RunConfig]) -> None:
    """Start, end, a refused and an allowed change, a resume, a checkpoint passed over: a line each, in order."""
    train(build(tiny(train={"steps": 8, "eval_every": 0})))
    newest = finished_checkpoints(tiny().dir / "checkpoints")[-1]
    (newest / "common.pt").write_bytes(b"damaged")
    other = tiny(train={"steps": 8, "eval_every": 0}, optimizer={"lr": 2e-3})
    with pytest.raises(ChangedError):
        build(other)
    train(build(other, "optimizer.lr"))
    lines = read_history(other.dir)
    assert [line["event"] for line in lines] == [
        "start",
        "done",
        "checkpoint passed over",
        "change refused",
        "checkpoint passed over",
        "resume",
        "change allowed",
        "done",
    ]
    assert "common.pt" in lines[2]["message"]
    assert "optimizer.lr: 0.001, now 0.002" in lines[3]["message"]
    assert (lines[5]["step"], lines[5]["consumed"], lines[5]["checkpoint"]) == (4, 32, "step-00000004")
    assert lines[6]["changes"] == ["optimizer.lr: 0.001, now 0.002"]
    with (other.dir / "history.jsonl").open("a") as file:
        file.write('{"time": 1, "eve')  # a kill in the middle of a line
    History(other.dir, topology()).add("start", step=8)
    assert [line["event"] for line in read_history(other.dir)] == [*(line["event"] for line in lines), "start"]


def test_a_word_that_is_no_setting_is_refused(tiny: Callable[..., RunConfig]) -> None:
    """A slip of the pen in what is allowed does not pass for allowing nothing."""
    train(build(tiny(train={"steps": 4, "eval_every": 0})))
    with pytest.raises(ChangedError, match="--allow-change optimiser: no such setting or section"):
        build(tiny(train={"steps": 5, "eval_every": 0}), "optimiser")

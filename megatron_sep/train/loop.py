"""The training loop."""

import math

from megatron_sep.errors import RunFailure, StoppedError
from megatron_sep.parallel.flags import Flag
from megatron_sep.parallel.seeds import seed_dropout
from megatron_sep.train.ending import accounted_for
from megatron_sep.train.engine import StepResult
from megatron_sep.train.rollback import roll_back
from megatron_sep.train.run import Run


class DivergedError(RunFailure):
    """Too many steps in a row whose gradient was not finite."""


def train(run: Run) -> None:
    """Train from where ``run.state`` stands to the last step, with validation and checkpoints on the way.

    Raises StoppedError once the run has saved what it was asked to stop at, NotWrittenError, DivergedError.
    """
    if run.state.step >= run.config.train.steps:
        run.topology.say(
            f"{run.config.dir} is done: step {run.state.step} of {run.config.train.steps}; raise train.steps to go on"
        )
        run.metrics.close()
        return
    with accounted_for(run):
        turn(run)


def turn(run: Run) -> None:
    """The steps."""
    config = run.config
    skipped_in_a_row, rollbacks = 0, dict[int, int]()
    if run.state.step == config.checkpoint.init_step:
        validate(run)
    while run.state.step < config.train.steps:
        step = run.state.step + 1
        run.topology.watch.at(f"in step {step}")
        seed_dropout(run.topology, config.train.seed, step)  # of the step alone, so a resumed run repeats it
        batches = run.statistics.counted(run.train_data.take(step, run.state.consumed))
        loss = run.engine.forward_backward(batches, run.train_data.num_microbatches)
        lr = run.schedule(step)
        done = run.spikes.step(run.engine, loss, lr, run.state)
        applied = done.result.applied
        run.state = run.state.advance(config.train.global_batch_size, applied, done.level)
        run.statistics.stepped(loss, applied)
        skipped_in_a_row = 0 if applied else skipped_in_a_row + 1
        asked, due = run.listen(), run.calendar.due(step)
        if done.spiked and config.train.spike.policy == "rollback":
            roll_back(run, rollbacks)
            continue
        if due.log:
            run.metrics.log(step, measured(run, step, lr, done.result))
        account_for_skipped(run, done.result, skipped_in_a_row)
        if due.validate:
            validate(run)
        if due.save or asked & {Flag.SAVE, Flag.STOP}:
            run.begin_save()
        if Flag.SAVE in asked:
            run.requests.answered(Flag.SAVE)
        if Flag.STOP in asked:
            stop(run)
    run.saves.finish()


def stop(run: Run) -> None:
    """End here, saved, as the run was asked to. Raises StoppedError, and NotWrittenError where it is not saved."""
    run.saves.finish()
    run.requests.answered(Flag.STOP)
    raise StoppedError(
        f"step {run.state.step} of {run.config.train.steps}: {run.requests.why}: saved and stopped; the same command "
        "goes on from here"
    )


def measured(run: Run, step: int, lr: float, result: StepResult) -> dict[str, float]:
    """What a status line tells: of the step itself, and means since the last line."""
    return {
        **run.statistics.values(step),
        **run.slow_ranks.compared(step, run.engine.own_seconds()),
        "train/lr": lr,
        "train/grad_norm": result.grad_norm,
        "train/consumed": run.state.consumed,
        "train/skipped": run.state.skipped,
        "train/loss_scale": run.engine.loss_scale(),
        **run.train_data.shares(run.state.consumed),
    }


def validate(run: Run) -> None:
    """The mean loss of a token of the validation split: of its first sequences, always the same ones, each once."""
    if run.valid_data is None:
        return
    size, samples = run.config.train.global_batch_size, run.valid_data.samples
    total, tokens = 0.0, 0
    with run.statistics.aside("validation"):
        for first in range(0, samples.num_samples, size):
            batches = run.valid_data.take(run.state.step, first)
            labels = samples.labels(range(first, first + size))
            total += float(run.engine.evaluate(batches, run.valid_data.num_microbatches)) * labels
            tokens += labels
    loss = total / tokens
    values = {"valid/loss": loss, "valid/perplexity": math.exp(min(loss, 700.0)), "valid/tokens": tokens}
    run.metrics.log(run.state.step, values | run.statistics.times("validation"))


def account_for_skipped(run: Run, result: StepResult, in_a_row: int) -> None:
    """Write a skipped step down. Raises DivergedError on every rank after too many, once a save on its way is over."""
    if result.applied:
        return
    run.history.add("skip", step=run.state.step, grad_norm=result.grad_norm, consumed=run.state.consumed)
    if in_a_row >= run.config.train.max_skipped_steps:
        run.saves.settle()
        raise DivergedError(
            f"step {run.state.step}: the gradient was not finite {in_a_row} steps in a row, or the loss a spike; the "
            "weights are those of the last good step. Lower optimizer.lr, train in bf16, or look at the data of these "
            "steps"
        )

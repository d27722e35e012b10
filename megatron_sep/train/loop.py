"""The training loop."""

import math
from dataclasses import replace

from megatron_sep.errors import RunFailure
from megatron_sep.parallel.seeds import seed_dropout
from megatron_sep.train.outcomes import Outcome
from megatron_sep.train.run import Run


class DivergedError(RunFailure):
    """Too many steps in a row whose gradient was not finite."""


def train(run: Run) -> None:
    """Train from where ``run.state`` stands to the last step, with validation and checkpoints on the way."""
    config = run.config
    if run.state.step >= config.train.steps:
        run.topology.say(
            f"{config.dir} is done: step {run.state.step} of {config.train.steps}; raise train.steps to go on"
        )
        run.metrics.close()
        return
    if run.state.step == config.checkpoint.init_step:
        validate(run)
    for step in range(run.state.step + 1, config.train.steps + 1):
        seed_dropout(run.topology, config.train.seed, step)  # of the step alone, so a resumed run repeats it
        batches = run.statistics.counted(run.train_data.take(step, run.state.consumed))
        loss = run.engine.forward_backward(batches, run.train_data.num_microbatches)
        result = run.engine.step(run.schedule(step))
        run.state = run.state.advance(config.train.global_batch_size)
        run.outcomes.add(step, loss, result.grad_norm)
        due = run.calendar.due(step)
        for outcome in run.outcomes.over(all_of_them=due.anything):
            account(run, outcome)
            if due.log and outcome.step == step:
                run.metrics.log(step, measured(run, outcome))
            stop_if_diverged(run.skipped_in_a_row, outcome.step, config.train.max_skipped_steps)
        if due.validate:
            validate(run)
        if due.save:
            with run.statistics.aside("save"):
                run.save()
    run.metrics.log(run.state.step, run.statistics.times("save"))
    run.metrics.close()


def account(run: Run, outcome: Outcome) -> None:
    """Count a step that is over."""
    run.statistics.stepped(outcome)
    run.skipped_in_a_row = 0 if outcome.applied else run.skipped_in_a_row + 1
    run.state = replace(run.state, skipped=run.state.skipped + (not outcome.applied))


def measured(run: Run, outcome: Outcome) -> dict[str, float]:
    """What a status line tells: of the step itself, and means since the last line."""
    return {
        **run.statistics.values(outcome.step),
        "train/lr": run.schedule(outcome.step),
        "train/grad_norm": outcome.grad_norm,
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


def stop_if_diverged(skipped_in_a_row: int, step: int, limit: int) -> None:
    if skipped_in_a_row >= limit:
        raise DivergedError(
            f"step {step}: the gradient was not finite {skipped_in_a_row} steps in a row; the weights are those of the "
            "last good step. Lower optimizer.lr, train in bf16, or look at the data of these steps"
        )

"""The training loop."""

import math
from dataclasses import replace

from megatron_sep.errors import RunFailure, StoppedError
from megatron_sep.parallel.flags import Flag
from megatron_sep.parallel.seeds import seed_dropout
from megatron_sep.train.attention_mass import AttentionMass
from megatron_sep.train.ending import accounted_for
from megatron_sep.train.outcomes import Outcome
from megatron_sep.train.rollback import roll_back
from megatron_sep.train.run import Run


class DivergedError(RunFailure):
    """Too many steps in a row that changed no weight."""


def train(run: Run) -> None:
    """Train from where ``run.state`` stands to the last step, with validation and checkpoints on the way.

    Raises StoppedError once the run has saved what it was asked to stop at, NotWrittenError, DivergedError,
    SpikesError.
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
    if run.state.step == config.checkpoint.init_step:
        validate(run)
    while run.state.step < config.train.steps:
        step = run.state.step + 1
        run.topology.watch.at(f"in step {step}")
        seed_dropout(run.topology, config.train.seed, step)  # of the step alone, so a resumed run repeats it
        batches = run.statistics.counted(run.train_data.take(step, run.state.consumed))
        loss = run.engine.forward_backward(batches, run.train_data.num_microbatches)
        grad_norm = run.spikes.step(run.engine, loss, run.schedule(step), run.state)
        run.state = run.state.advance(config.train.global_batch_size)
        run.outcomes.add(step, loss, grad_norm)
        asked, due = run.listen(), run.calendar.due(step)
        for outcome in run.outcomes.over(all_of_them=due.anything or bool(asked) or run.spikes.wait):
            account(run, outcome)
            if due.log and outcome.step == step:
                run.metrics.log(step, measured(run, outcome))
            stop_if_diverged(run, outcome.step)
        if run.spiked and config.train.spike.policy == "rollback" and roll_back(run):
            continue
        if due.validate:
            validate(run)
        if due.look and run.mass is not None:
            look_at_attention(run, run.mass)
        if due.save or asked:
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


def account(run: Run, outcome: Outcome) -> None:
    """Count a step that is over."""
    run.statistics.stepped(outcome)
    run.metrics.stepped(outcome.step)
    run.skipped_in_a_row = 0 if outcome.applied else run.skipped_in_a_row + 1
    run.spiked, level = run.spikes.judged(outcome, run.state)
    run.state = replace(run.state, skipped=run.state.skipped + (not outcome.applied), level=level)
    if not outcome.applied:
        run.history.add("skip", step=outcome.step, loss=outcome.loss, grad_norm=outcome.grad_norm)


def measured(run: Run, outcome: Outcome) -> dict[str, float]:
    """What a status line tells: of the step itself, and means since the last line."""
    return {
        **run.statistics.values(outcome.step),
        **run.slow_ranks.compared(outcome.step, run.engine.own_seconds()),
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


def look_at_attention(run: Run, mass: AttentionMass) -> None:
    """What attention pays to each kind of key, on the first rows of the data."""
    with run.statistics.aside("attention_mass"):
        values = mass.values(run.train_data, run.state.step)
    run.metrics.log(run.state.step, values | run.statistics.times("attention_mass"))


def stop_if_diverged(run: Run, step: int) -> None:
    """Raise DivergedError on every rank, once a save that is on its way is over."""
    if run.skipped_in_a_row >= run.config.train.max_skipped_steps:
        run.saves.settle()
        raise DivergedError(
            f"step {step}: the gradient was not finite {run.skipped_in_a_row} steps in a row, or the loss a spike; the "
            "weights are those of the last good step. Lower optimizer.lr, train in bf16, or look at the data of these "
            "steps"
        )

"""Back to the newest checkpoint after a spike, and on from there with other data."""

from dataclasses import replace

from megatron_sep.errors import RunFailure
from megatron_sep.train.run import Run
from megatron_sep.weights.sealed import describe


class SpikesError(RunFailure):
    """The loss spikes again and again after the same checkpoint, whatever the data."""


def roll_back(run: Run) -> bool:
    """Take over the newest checkpoint; the data go on after those of the spike. Every rank calls it together.

    False: there is none yet, and the run stays where it is. Raises SpikesError.
    """
    run.saves.settle()
    newest, at = run.checkpoints.newest(), run.state
    if newest is None:
        run.topology.say(f"step {at.step}: no checkpoint to go back to yet; training goes on")
        return False
    state = replace(describe(newest).state, consumed=at.consumed)
    limit = run.config.train.spike.rollbacks
    if run.rollbacks.get(state.step, 0) >= limit:
        raise SpikesError(
            f"step {at.step}: the loss spiked again after {limit} rollbacks to {newest}, each with other data. Lower "
            "optimizer.lr, or look at the weights of that checkpoint"
        )
    run.rollbacks[state.step] = run.rollbacks.get(state.step, 0) + 1
    run.engine.load(newest)
    run.state = state
    run.metrics.rewind(state.step)
    run.statistics.forget()
    run.topology.say(f"step {at.step}: back to {newest}; on from there with sequence {state.consumed} of the run")
    run.history.add("rollback", spiked=at.step, step=state.step, consumed=state.consumed, checkpoint=newest.name)
    return True

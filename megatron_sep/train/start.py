"""Where a run starts: at its newest checkpoint, with what it was begun with, or anew."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.config import to_yaml
from megatron_sep.config.schema import RunConfig
from megatron_sep.data.content import contents
from megatron_sep.errors import StoppedError
from megatron_sep.files import versions
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.changes import Began, ChangedError, check_changes
from megatron_sep.train.checkpoint import Checkpoints
from megatron_sep.train.engine import Engine, engine_class
from megatron_sep.train.history import History
from megatron_sep.train.written import read_history
from megatron_sep.weights.sealed import CheckpointError, Description, TrainState, check_fits, describe


@dataclass(frozen=True)
class Start:
    """Found before any model is built."""

    config: RunConfig
    """With the steps of its learning rate."""
    contents: Mapping[str, str]
    """Sums of what the run reads."""
    newest: Path | None
    """The checkpoint that it goes on from."""
    changes: tuple[str, ...] = ()
    """Settings that are not as they were, all of them allowed."""


def check_not_stopped(run_dir: Path, environment: Mapping[str, str]) -> None:
    """Raise StoppedError where torchrun has started a run again that was asked to stop."""
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts and [line["event"] for line in read_history(run_dir)][-1:] == ["stopped"]:
        raise StoppedError(
            f"{run_dir} was stopped as it was asked to; torchrun's restart {restarts} does not change that"
        )


def find_start(
    config: RunConfig,
    vocab_size: int,
    checkpoints: Checkpoints,
    history: History,
    topology: Topology,
    allow_change: Sequence[str],
) -> Start:
    """Raises CheckpointError and ChangedError; what is refused and passed over is written down."""
    newest = checkpoints.newest(lambda fault: history.add("checkpoint passed over", message=fault))
    config = _with_schedule(config, newest, topology)
    read = topology.tell(lambda: contents(config.data, config.tokenizer))
    if newest is None:
        return Start(config, read, None)
    found = describe(newest)
    check_fits(newest, found, config.model, vocab_size)
    _check_goes_on(newest, found, config)
    then, now = Began(found.config, found.contents), Began(config, read)
    try:
        changes = topology.tell(lambda: check_changes(then, now, allow_change))
    except ChangedError as refused:
        history.add("change refused", step=found.state.step, message=str(refused))
        raise
    return Start(config, read, newest, tuple(changes))


def _check_goes_on(newest: Path, found: Description, config: RunConfig) -> None:
    """Raises CheckpointError for the checkpoint of an engine or of an optimizer that these cannot go on from."""
    then, kind = found.config.optimizer.kind, config.optimizer.kind
    if then != kind:
        raise CheckpointError(
            f"{newest}: has the state of optimizer.kind={then}, which {kind} has no use for; set it as it was, or "
            "start a new dir from these weights with checkpoint.init_from"
        )
    engine = config.parallel.engine
    if found.engine not in (engine, *engine_class(engine).reads):
        raise CheckpointError(
            f"{newest}: was written by the engine {found.engine!r}, parallel.engine is {engine!r}; set "
            "parallel.engine as it was, or start a new dir from these weights with checkpoint.init_from"
        )


def take_up(start: Start, engine: Engine, history: History, topology: Topology) -> TrainState:
    """Load what the run goes on from; where it stands then, or the step that its first weights are said to be of."""
    config = start.config
    history.keep_settings(to_yaml(config))
    about = {"ranks": topology.process.size, "host": platform.node(), **versions("megatron_sep", "torch")}
    if start.newest is None:
        first = config.checkpoint.init_step
        state = TrainState(step=first, consumed=first * config.train.global_batch_size)
        history.add("start", step=first, consumed=state.consumed, **about)
        return state
    engine.load(start.newest)
    state = describe(start.newest).state
    topology.say(f"resumed from {start.newest} at step {state.step}")
    history.add("resume", step=state.step, consumed=state.consumed, checkpoint=start.newest.name, **about)
    if start.changes:
        topology.say(f"from here on with other settings: {'; '.join(start.changes)}")
        history.add("change allowed", step=state.step, changes=start.changes)
    return state


def _with_schedule(config: RunConfig, newest: Path | None, topology: Topology) -> RunConfig:
    """The configuration with the steps of its learning rate: as they are set, else as the run was started."""
    steps = config.optimizer.decay_steps
    if steps is None and newest is not None:
        started = describe(newest).config
        steps = started.optimizer.decay_steps or started.train.steps
        if steps != config.train.steps:
            topology.say(
                f"the learning rate falls until step {steps}, as this run was started; train.steps is now "
                f"{config.train.steps}: set optimizer.decay_steps to change that"
            )
    optimizer = config.optimizer.model_copy(update={"decay_steps": steps or config.train.steps})
    return config.model_copy(update={"optimizer": optimizer})

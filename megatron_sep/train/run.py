"""Builds everything a run is made of, from its configuration; nothing is trained here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sep.attention.annealing import Annealing
from megatron_sep.config.layout import job_mistakes
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.data.once import Once
from megatron_sep.data.open_data import open_data
from megatron_sep.data.resolved import Resolved, resolve
from megatron_sep.data.samples import Samples
from megatron_sep.data.separator_notes import separator_notes
from megatron_sep.data.shard_tokenizer import unknown_tokenizers
from megatron_sep.errors import UserError
from megatron_sep.model.build import build_model
from megatron_sep.model.decoder import Decoder
from megatron_sep.model.load_weights import load_weights
from megatron_sep.parallel.device import set_determinism
from megatron_sep.parallel.flags import Flag
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.attention_mass import AttentionMass
from megatron_sep.train.calendar import Calendar
from megatron_sep.train.checkpoint import Checkpoints
from megatron_sep.train.engine import Engine, engine_class
from megatron_sep.train.exports import Exporter, Exports, exporter_of
from megatron_sep.train.feed import Feed
from megatron_sep.train.first_optimizer import take_over
from megatron_sep.train.first_weights import open_first_weights
from megatron_sep.train.header import header
from megatron_sep.train.history import History
from megatron_sep.train.metrics import Metrics, make_metrics
from megatron_sep.train.outcomes import Outcomes
from megatron_sep.train.own_work import SlowRanks
from megatron_sep.train.preflight import Need, preflight
from megatron_sep.train.requests import Requests
from megatron_sep.train.saves import Saves
from megatron_sep.train.schedule import LearningRate
from megatron_sep.train.signals import Signals
from megatron_sep.train.spikes import Spikes
from megatron_sep.train.start import check_not_stopped, find_start, take_up
from megatron_sep.train.statistics import Statistics
from megatron_sep.weights.sealed import Description, TrainState
from megatron_sep.weights.zero_files import ZeroOptimizer


@dataclass
class Run:
    """What the training loop turns."""

    config: RunConfig
    topology: Topology
    vocab_size: int
    contents: Mapping[str, str]
    """Sums of what the run reads."""
    engine: Engine
    train_data: Feed
    valid_data: Feed | None
    calendar: Calendar
    schedule: LearningRate
    checkpoints: Checkpoints
    metrics: Metrics
    statistics: Statistics
    mass: AttentionMass | None
    """None: it is not looked at."""
    saves: Saves
    requests: Requests
    spikes: Spikes
    slow_ranks: SlowRanks
    history: History
    state: TrainState
    outcomes: Outcomes = field(default_factory=Outcomes)
    skipped_in_a_row: int = 0
    spiked: bool = False
    """Is the loss of the last step that is over a spike?"""
    rollbacks: dict[int, int] = field(default_factory=dict)
    """How often the run went back to a checkpoint, by its step."""

    def begin_save(self) -> None:
        """Begin to write a checkpoint of where the run stands; ``saves`` goes on with it."""
        described = Description(self.state, self.config, self.vocab_size, self.engine.name, self.contents)
        self.saves.begin(described)

    def save(self) -> None:
        """Write a checkpoint of where the run stands, and wait for it. Raises NotWrittenError."""
        self.begin_save()
        self.saves.finish()

    def listen(self) -> frozenset[Flag]:
        """What any process is asked for; saves on their way are carried on. Every rank calls it once a step."""
        self.saves.tell()
        self.requests.look()
        heard = self.topology.flags.hear()
        self.saves.go_on(heard)
        return self.requests.among(heard)


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked before any model is built."""

    resolved: Resolved
    train: Samples
    valid: Once | None


class RunError(UserError):
    """A configuration that does not fit its data or its job."""


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and data and check that they fit the model, with no model, GPU or process group needed."""
    resolved = resolve(config.tokenizer, config.model, config.attention)
    counts, size = config.train, config.train.global_batch_size
    length = config.model.sequence_length
    train = open_data(config.data, "train", length, resolved.tokenizer, counts.steps * size)
    valid = None
    if counts.eval_every:
        asked = counts.eval_batches * size
        valid = Once(open_data(config.data, "valid", length, resolved.tokenizer, asked), asked)
    return Inputs(resolved, train, valid)


def _notes(config: RunConfig, inputs: Inputs) -> list[str]:
    """What a user should know of the data, and of what is taken over, before it is trained on."""
    assumed = unknown_tokenizers(config.data.sources, config.tokenizer.path)
    separators = separator_notes(config.attention, inputs.resolved, inputs.train)
    return [
        *_taken_over(config),
        *assumed,
        *inputs.train.notes(),
        *(inputs.valid.notes() if inputs.valid else ()),
        *separators,
    ]


def _taken_over(config: RunConfig) -> list[str]:
    """What a run that goes on from GPT-NeoX's checkpoint takes of it, and what it cannot."""
    checkpoint = config.checkpoint
    if not checkpoint.init_optimizer:
        return []
    scale = "; the loss scale begins at train.loss_scale.initial" if config.train.precision == "fp16" else ""
    dropout = config.model.hidden_dropout or config.model.attention_dropout
    drawn = "; dropout draws from this program's own random numbers" if dropout else ""
    return [
        f"starts at step {checkpoint.init_step} from {checkpoint.init_from}: weights, AdamW's moments and steps, the "
        f"schedule and the place in the data are taken over{scale}{drawn}"
    ]


def build_run(
    config: RunConfig,
    topology: Topology,
    allow_change: Sequence[str] = (),
    signals: Signals | None = None,
    export: Exporter | None = None,
) -> Run:
    """Everything, resumed from the newest complete checkpoint of ``config.dir`` where there is one.

    ``allow_change``: settings that may differ from those the checkpoint was written with. ``signals``: what is
    received while the run is trained. ``export``: what writes the checkpoints of ``checkpoint.export_every``. An error
    of one process is raised on all. Raises RunError, ExportError, ChangedError, PreflightError, CheckpointError,
    SourceError, StoppedError, and what ``open_inputs`` raises.
    """
    topology.tell(lambda: check_not_stopped(config.dir, os.environ))
    topology.watch.at("opening the data")
    inputs: Inputs = topology.together(lambda: open_inputs(config))
    resolved = inputs.resolved
    _check_job(config, resolved.vocab_size, topology)
    exporter = exporter_of(config, resolved.vocab_size, export)
    topology.watch.at("looking for its newest checkpoint")
    checkpoints, history = Checkpoints(config.dir, config.checkpoint.keep, topology), History(config.dir, topology)
    start = find_start(config, resolved.vocab_size, checkpoints, history, topology, allow_change)
    config, size = start.config, ModelSize(config.model, resolved.vocab_size)
    seen = preflight(config, inputs.train, Need.of(config, size, topology), topology)
    topology.watch.at("building the model")
    set_determinism(config.train.deterministic)
    engine: Engine = topology.together(lambda: _engine(config, resolved, topology, new=start.newest is None))
    state = take_up(start, engine, history, topology)
    title = header(config, resolved, topology) if config.metrics.console != "off" else ()
    for note in [*title, *topology.tell(lambda: _notes(config, inputs)), *seen]:
        topology.say(note)
    exports = Exports(
        config.dir, config.checkpoint.every * (config.checkpoint.export_every or 1), exporter, topology, history
    )
    exports.take_up(start.newest, state.step)
    annealing = Annealing(resolved.rules, config.attention.anneal, config.checkpoint.init_step)
    counts, look = config.train, config.metrics.attention_mass_every
    calendar = Calendar(counts.steps, config.metrics.every, counts.eval_every, config.checkpoint.every, look or 0)
    mass = AttentionMass(engine, config.attention, resolved, topology) if look else None
    statistics = Statistics(size, resolved.rules, calendar, topology)
    batch = config.train.global_batch_size
    return Run(
        config=config,
        topology=topology,
        vocab_size=resolved.vocab_size,
        contents=start.contents,
        engine=engine,
        train_data=Feed(inputs.train, annealing, config.train, topology),
        valid_data=Feed(inputs.valid, lambda _: resolved.rules, config.train, topology) if inputs.valid else None,
        calendar=calendar,
        schedule=LearningRate(config.optimizer, config.optimizer.decay_steps or config.train.steps),
        checkpoints=checkpoints,
        metrics=_metrics(config, state, topology),
        statistics=statistics,
        mass=mass,
        saves=Saves(checkpoints, exports, engine, statistics, history, config.checkpoint.background),
        requests=Requests(config.dir, topology, signals or Signals()),
        spikes=Spikes(config.train.spike, inputs.train, batch, history, topology),
        slow_ranks=SlowRanks(topology, history),
        history=history,
        state=state,
    )


def _engine(config: RunConfig, resolved: Resolved, topology: Topology, new: bool) -> Engine:
    """The engine with its model; ``new``: its weights are those of ``checkpoint.init_from`` where that is given."""
    init_from = config.checkpoint.init_from
    source = None
    if new and init_from is not None:
        source = open_first_weights(init_from, config.model, config.tokenizer.path, resolved.tokenizer.vocab_size)
    zero = None
    if source is not None and config.checkpoint.init_optimizer:
        zero = ZeroOptimizer(source.place, source.config)
    whole = config.model.model_copy(update={"vocab_size": resolved.vocab_size})
    model, *further_chunks = _models(config, resolved.vocab_size, topology)
    if source is not None:
        for part in (model, *further_chunks):
            load_weights(part, source, whole, topology)
    engine: Engine = engine_class(config.parallel.engine, config.optimizer.kind)(
        model,
        topology,
        config.optimizer,
        precision=config.train.precision,
        loss_scale=config.train.loss_scale,
        sequence_length=config.model.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
        cuda_graphs=config.train.cuda_graphs,
        zero_stage=config.parallel.zero_stage,
        **({"further_chunks": further_chunks} if further_chunks else {}),
    )
    if source is not None and zero is not None:
        for part in (model, *further_chunks):
            take_over(engine, part, zero, source.vocab_size, whole, topology)
    return engine


def _compiled(config: RunConfig, topology: Topology) -> bool:
    """Whether layers are compiled: not where they talk to other ranks, nor where their weights come and go (ZeRO 3)."""
    asked, parallel = config.train.compile, config.parallel
    whole = not parallel.splits_layers and parallel.zero_stage < 3
    return asked == "on" or (asked == "auto" and topology.device.type == "cuda" and whole)


def _models(config: RunConfig, vocab_size: int, topology: Topology) -> list[Decoder]:
    """This process's part of the model: one, or one a chunk of an interleaved pipeline."""
    train = config.train
    return [
        build_model(
            config.model,
            topology,
            sequence_parallel=config.parallel.sequence_parallel,
            vocab_size=vocab_size,
            precision=train.precision,
            seed=train.seed,
            backend=config.attention.backend,
            other_backends=train.operations,
            loss_chunk=train.loss_chunk,
            recompute=train.recompute,
            compiled=_compiled(config, topology),
            chunk=chunk,
        )
        for chunk in range(topology.chunks)
    ]


def _check_job(config: RunConfig, vocab_size: int, topology: Topology) -> None:
    """Raise RunError with all that does not fit this job, before a model is built."""
    mistakes = job_mistakes(config.parallel, config.train, topology.process.size)
    if vocab_size % topology.tensor.size:
        mistakes.append(
            f"the vocabulary of {vocab_size} (model.vocab_multiple={config.model.vocab_multiple}) does not divide by "
            f"parallel.tensor={topology.tensor.size}; set model.vocab_multiple to a multiple of that"
        )
    if mistakes:
        raise RunError("; ".join(mistakes))


def _metrics(config: RunConfig, state: TrainState, topology: Topology) -> Metrics:
    if not topology.first:
        return Metrics([])
    return make_metrics(config.metrics, config.dir, config.model_dump(mode="json"), state.step, config.train.steps)

"""Builds everything a run is made of, from its configuration; nothing is trained here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_sep.attention.annealing import Annealing
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import RunConfig, TrainConfig
from megatron_sep.data.batches import Samples
from megatron_sep.data.instruct import CountsLoss
from megatron_sep.data.open import open_data
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.model.build import build_model
from megatron_sep.model.size import ModelSize, padded_vocab_size
from megatron_sep.parallel.groups import current_device, is_first_rank
from megatron_sep.train import checkpoint
from megatron_sep.train.checkpoint import Checkpoints, TrainState
from megatron_sep.train.engine import Engine, MegatronEngine
from megatron_sep.train.metrics import Metrics, make_metrics
from megatron_sep.train.microbatch import Microbatch
from megatron_sep.train.schedule import LearningRate
from megatron_sep.train.start import start
from megatron_sep.train.statistics import Statistics


@dataclass
class Run:
    """What the training loop turns."""

    config: RunConfig
    vocab_size: int
    engine: Engine
    train_data: "Feed"
    valid_data: "Feed | None"
    schedule: LearningRate
    checkpoints: Checkpoints
    metrics: Metrics
    statistics: Statistics
    state: TrainState

    def say(self, message: str) -> None:
        """Print once for the job."""
        if is_first_rank():
            print(message, flush=True)

    def save(self) -> Path:
        return self.checkpoints.save(self.state, self.config, self.vocab_size, self.engine.state())


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked before any model is built."""

    tokenizer: Tokenizer
    vocab_size: int
    rules: LayerRules
    train: Samples
    valid: Samples | None


class Feed:
    """This rank's micro-batches of a global batch."""

    def __init__(self, samples: Samples, rules: Callable[[int], LayerRules], train: TrainConfig) -> None:
        """``rules`` of a step: the window may shrink from one to the next."""
        self.samples, self.rules, self.size = samples, rules, train.micro_batch_size
        self.rank: int = parallel_state.get_data_parallel_rank()
        self.ranks: int = parallel_state.get_data_parallel_world_size()
        self.global_batch_size = train.global_batch_size
        self.device = current_device()

    @property
    def num_microbatches(self) -> int:
        """Of one rank in one step."""
        return self.global_batch_size // (self.size * self.ranks)

    def shares(self, consumed: int) -> dict[str, float]:
        """Share and epochs of each source so far, beside the share that was asked for."""
        shares = self.samples.shares(consumed)
        values = {f"data/{s.name}/epochs": s.epochs for s in shares}
        if len(shares) > 1:
            values |= {f"data/{s.name}/share": s.given for s in shares}
            values |= {f"data/{s.name}/share_asked": s.asked for s in shares}
        return values

    def take(self, consumed: int, statistics: Statistics | None = None) -> Iterator[Microbatch]:
        """The global batch that follows ``consumed`` sequences, whatever the number of ranks."""
        rules = self.rules(consumed // self.global_batch_size + 1)
        share = self._share_that_counts(consumed)
        for i in range(self.num_microbatches):
            first = consumed + (i * self.ranks + self.rank) * self.size
            rows = torch.from_numpy(self.samples.take(first, self.size))
            weight = None
            if isinstance(self.samples, CountsLoss):
                weight = torch.from_numpy(self.samples.loss_mask(first, self.size)) / share
            batch = Microbatch.of(rows, rules, self.device, weight)
            if statistics is not None:
                statistics.count(batch)
            yield batch

    def _share_that_counts(self, consumed: int) -> float:
        """Of the labels of a whole global batch, so that its loss is one mean on any number of ranks."""
        if not isinstance(self.samples, CountsLoss):
            return 1.0
        return max(float(self.samples.loss_mask(consumed, self.global_batch_size)[:, 1:].mean()), 1e-9)


class RunError(ValueError):
    """A configuration that does not fit its data or its job."""


def open_inputs(config: RunConfig) -> Inputs:
    """Open tokenizer and data and check that they fit the model, with no model, GPU or process group needed."""
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod)
    vocab_size = padded_vocab_size(config.model, tokenizer.vocab_size)
    rules = LayerRules.of(config.attention, config.model.num_layers, tokenizer)
    counts, size = config.train, config.train.global_batch_size
    length = config.model.sequence_length
    train = open_data(config.data, "train", length, tokenizer, counts.steps * size)
    valid = None
    if counts.eval_every:
        valid = open_data(config.data, "valid", length, tokenizer, counts.eval_batches * size)
    return Inputs(tokenizer, vocab_size, rules, train, valid)


def build_run(config: RunConfig) -> Run:
    """Everything, resumed from the newest complete checkpoint of ``config.dir`` where there is one.

    Needs the process groups of ``parallel.groups``. Raises RunError, CheckpointError, and what ``open_inputs`` raises.
    """
    inputs = open_inputs(config)
    _check_batch(config)
    model = config.model
    on_gpu = torch.cuda.is_available()
    built = build_model(
        model,
        config.parallel,
        vocab_size=inputs.vocab_size,
        precision=config.train.precision,
        seed=config.train.seed,
        backend=config.attention.backend,
        recompute=config.train.recompute,
        compiled=config.train.compile == "on" or (config.train.compile == "auto" and on_gpu),
    )
    checkpoints = Checkpoints(config.dir, config.checkpoint.keep)
    newest = checkpoints.newest()
    if newest is None and config.checkpoint.init_from is not None:
        start(built, config, inputs.vocab_size)
    engine = MegatronEngine(
        built,
        config.optimizer,
        precision=config.train.precision,
        loss_scale=config.train.loss_scale,
        sequence_length=model.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
    )
    state = _resume(newest, engine, config, inputs.vocab_size)
    steps = config.train.steps
    return Run(
        config=config,
        vocab_size=inputs.vocab_size,
        engine=engine,
        train_data=Feed(
            inputs.train, Annealing(inputs.rules, config.attention.anneal, config.checkpoint.init_step), config.train
        ),
        valid_data=Feed(inputs.valid, lambda _: inputs.rules, config.train) if inputs.valid else None,
        schedule=LearningRate(config.optimizer, config.optimizer.decay_steps or steps),
        checkpoints=checkpoints,
        metrics=_metrics(config, state, steps),
        statistics=Statistics(ModelSize(model, inputs.vocab_size), inputs.rules, steps),
        state=state,
    )


def _check_batch(config: RunConfig) -> None:
    ranks = parallel_state.get_data_parallel_world_size()
    together = config.train.micro_batch_size * ranks
    if config.train.global_batch_size % together:
        raise RunError(
            f"train.global_batch_size={config.train.global_batch_size} does not divide by train.micro_batch_size="
            f"{config.train.micro_batch_size} x {ranks} data-parallel rank(s); set it to a multiple of {together}"
        )


def _metrics(config: RunConfig, state: TrainState, steps: int) -> Metrics:
    if not is_first_rank():
        return Metrics([])
    return make_metrics(config.metrics, config.dir, config.model_dump(mode="json"), state.step, steps)


def _resume(newest: Path | None, engine: Engine, config: RunConfig, vocab_size: int) -> TrainState:
    """Where the run stands: at its newest checkpoint, or at the step its first weights are said to be of."""
    if newest is None:
        first = config.checkpoint.init_step
        return TrainState(step=first, consumed=first * config.train.global_batch_size)
    checkpoint.check_fits(newest, checkpoint.describe(newest), config, vocab_size)
    state, tensors = checkpoint.load(newest, engine.state(loading=True))
    engine.load_state(tensors)
    if is_first_rank():
        print(f"resumed from {newest} at step {state.step}", flush=True)
    return state

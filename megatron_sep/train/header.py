"""What a run begins with on the console: model, layout, device, patterns, and where things go."""

from collections.abc import Iterator

import torch

from megatron_sep.attention.words import layer_lines
from megatron_sep.config.needs import Needs
from megatron_sep.config.schema import RunConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.data.resolved import Resolved
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.written import HISTORY, METRICS, SETTINGS


def header(config: RunConfig, resolved: Resolved, topology: Topology) -> Iterator[str]:
    """A few lines, the same for every rank."""
    size = ModelSize(config.model, resolved.vocab_size)
    model = config.model
    yield (
        f"model: {size.parameters:,} parameters in {model.num_layers} layers of {model.hidden_size}, vocabulary "
        f"{resolved.vocab_size:,}, {config.train.precision}"
    )
    yield f"layout: {_layout(topology)} on {_device(topology)}, engine {config.parallel.engine}"
    needs = Needs(config, resolved.vocab_size, topology.process.size)
    tokens = config.train.global_batch_size * model.sequence_length
    yield (
        f"step: {tokens:,} tokens, {needs.microbatches} micro-batch(es) of {config.train.micro_batch_size} x "
        f"{model.sequence_length} a process; {config.train.steps:,} steps"
    )
    yield from layer_lines(resolved.rules.patterns)
    yield f"to {config.dir}: {', '.join(_places(config))}"


def _layout(topology: Topology) -> str:
    axes = {
        "data": topology.data.size,
        "tensor": topology.tensor.size,
        "pipeline": topology.pipeline.size,
        "context": topology.context.size,
    }
    split = " x ".join(f"{axis} {ranks}" for axis, ranks in axes.items() if ranks > 1)
    return f"{topology.process.size} process(es){f', {split}' if split else ''}"


def _device(topology: Topology) -> str:
    return torch.cuda.get_device_name() if topology.device.type == "cuda" else "the CPU"


def _places(config: RunConfig) -> Iterator[str]:
    keep = config.checkpoint.keep
    yield f"checkpoints/ every {config.checkpoint.every} steps{f', the newest {keep}' if keep else ''}"
    yield from (METRICS, HISTORY, SETTINGS)
    if config.metrics.tensorboard:
        yield "tensorboard/"
    if config.metrics.wandb != "off":
        yield f"wandb ({config.metrics.wandb}, project {config.metrics.wandb_project})"

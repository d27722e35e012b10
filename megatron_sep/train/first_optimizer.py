"""The optimizer that a new run starts from, where another program's is taken over with its weights."""

import torch
from torch import nn

from megatron_sep.config.schema import ModelConfig
from megatron_sep.model.init import global_parameters
from megatron_sep.model.load_weights import part_of
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine
from megatron_sep.weights.zero_files import KINDS, ZeroOptimizer


@torch.no_grad()
def take_over(
    engine: Engine, model: nn.Module, zero: ZeroOptimizer, rows: int, config: ModelConfig, topology: Topology
) -> None:
    """Copy this rank's part of fp32 weights and moments; ``rows`` are those of the saved embedding.

    Raises CheckpointError, WeightsError.
    """
    slots = engine.optimizer_slots()
    sources = {kind: zero.source(kind, rows) for kind in KINDS}
    for name, parameter in global_parameters(model, config, topology):
        slot = slots.get(parameter)
        if slot is None:  # another data-parallel rank keeps it
            continue
        for kind, source in sources.items():
            part = part_of(source, name, parameter, config, topology)
            slot.tensors[kind].copy_(part.flatten()[slot.values])
        slot.tensors["step"].fill_(zero.steps)

"""Fills this rank's part of a model from weights on disk."""

import torch
from torch import Tensor, nn

from megatron_sep.config.schema import ModelConfig
from megatron_sep.model.init import global_parameters, local_part
from megatron_sep.parallel.topology import Topology
from megatron_sep.weights.source import Source


@torch.no_grad()
def load_weights(model: nn.Module, source: Source, config: ModelConfig, topology: Topology) -> None:
    """Copy this rank's part of every weight into a model; rows of the vocabulary that the source lacks become 0."""
    for name, parameter in global_parameters(model, config, topology):
        parameter.copy_(part_of(source, name, parameter, config, topology))


def part_of(source: Source, name: str, parameter: nn.Parameter, config: ModelConfig, topology: Topology) -> Tensor:
    """This rank's part of a weight of the whole model."""
    if config.tie_embeddings and name == "output_layer.weight":  # its copy on the last pipeline stage
        name = "embedding.word_embeddings.weight"
    whole = source.weight(name)
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = _with_rows(whole, config.vocab_size or source.vocab_size)
    return local_part(name, whole, parameter, config, topology.tensor)


def _with_rows(whole: Tensor, rows: int) -> Tensor:
    if whole.shape[0] >= rows:
        return whole[:rows]
    return torch.cat([whole, whole.new_zeros(rows - whole.shape[0], *whole.shape[1:])])

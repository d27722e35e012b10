"""Initial weights: Pythia's distributions, and the same numbers in every parallel layout.

Each parameter draws from a generator seeded by (seed, its name in the whole model), so neither the number of tensor-
and pipeline-parallel ranks nor the order of construction changes a weight.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_sep.config.schema import ModelConfig

_WRITES_TO_RESIDUAL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def init_std(kind: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix: small_init (arXiv 1910.05895), wang_init (mesh-transformer-jax), or init_std."""
    return {
        "small_init": math.sqrt(2 / (5 * config.hidden_size)),
        "wang_init": 2 / config.num_layers / math.sqrt(config.hidden_size),
        "normal": config.init_std,
    }[kind]


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of this rank in place; biases 0, norm weights 1."""
    for name, parameter in global_parameters(model):
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
        else:
            kind = config.output_init if name.endswith(_WRITES_TO_RESIDUAL) else config.init
            parameter.copy_(_draw(name, parameter, seed) * init_std(kind, config))


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under their name in the whole model: layers counted across pipeline stages."""
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


def _draw(name: str, parameter: nn.Parameter, seed: int) -> Tensor:
    """This tensor-parallel rank's part of a standard normal matrix, fp32."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    shape = list(parameter.shape)
    split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
    ranks = parallel_state.get_tensor_model_parallel_world_size() if split >= 0 else 1
    shape[split] *= ranks
    whole = torch.empty(shape, device="cpu").normal_(generator=generator)
    return whole.chunk(ranks, split)[parallel_state.get_tensor_model_parallel_rank() if ranks > 1 else 0]

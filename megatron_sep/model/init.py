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
            whole = _draw(name, whole_shape(parameter), seed)
            parameter.copy_(local_part(name, whole, parameter, config) * init_std(kind, config))


def global_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under their name in the whole model: layers counted across pipeline stages."""
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


def local_part(name: str, whole: Tensor, parameter: nn.Parameter, config: ModelConfig) -> Tensor:
    """This tensor-parallel rank's part of a weight of the whole model.

    SwiGLU's first matrix is the gate above the value, and a rank holds its part of each.
    """
    ranks = _ranks_of(parameter)
    if ranks == 1:
        return whole
    rank, axis = parallel_state.get_tensor_model_parallel_rank(), parameter.partition_dim  # type: ignore[attr-defined]
    gated = config.gated_mlp and ".linear_fc1." in name
    halves = whole.chunk(2) if gated else (whole,)
    return torch.cat([half.chunk(ranks, axis)[rank] for half in halves], axis)


def whole_shape(parameter: nn.Parameter) -> list[int]:
    """Of the weight of the whole model that this rank holds a part of."""
    shape = list(parameter.shape)
    if (ranks := _ranks_of(parameter)) > 1:
        shape[parameter.partition_dim] *= ranks  # type: ignore[attr-defined]
    return shape


def _ranks_of(parameter: nn.Parameter) -> int:
    """Tensor-parallel ranks that share a weight."""
    split = getattr(parameter, "tensor_model_parallel", False) and getattr(parameter, "partition_dim", -1) >= 0
    return parallel_state.get_tensor_model_parallel_world_size() if split else 1


def _draw(name: str, shape: list[int], seed: int) -> Tensor:
    """A standard normal matrix of the whole model, fp32."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape, device="cpu").normal_(generator=generator)

"""Initial weights: Pythia's distributions, and the same numbers in every parallel layout.

Each parameter draws from a generator seeded by (seed, its name in the whole model), so neither the number of tensor-
and pipeline-parallel ranks nor the order of construction changes a weight.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_sep.config.schema import ModelConfig
from megatron_sep.parallel.topology import Axis, Topology

_WRITES_TO_RESIDUAL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


def init_std(kind: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix: small_init (arXiv 1910.05895), wang_init (mesh-transformer-jax), or init_std.

    scaled_normal is init_std for matrices that write to the residual stream, two a layer (arXiv 1909.08053).
    """
    return {
        "small_init": math.sqrt(2 / (5 * config.hidden_size)),
        "wang_init": 2 / config.num_layers / math.sqrt(config.hidden_size),
        "normal": config.init_std,
        "scaled_normal": config.init_std / math.sqrt(2 * config.num_layers),
    }[kind]


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int, topology: Topology) -> None:
    """Fill every parameter of this rank in place; biases 0, norm weights 1."""
    for name, parameter in global_parameters(model, config, topology):
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
        else:
            kind = config.output_init if name.endswith(_WRITES_TO_RESIDUAL) else config.init
            whole = _draw(name, whole_shape(parameter, topology.tensor), seed)
            parameter.copy_(local_part(name, whole, parameter, config, topology.tensor) * init_std(kind, config))


def global_parameters(model: nn.Module, config: ModelConfig, topology: Topology) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters under their name in the whole model: layers counted across pipeline stages and their chunks."""
    offset = topology.layers(config.num_layers, getattr(model, "vp_stage", None) or 0).start
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + offset)
        yield ".".join(parts), parameter


def local_part(name: str, whole: Tensor, parameter: nn.Parameter, config: ModelConfig, tensor: Axis) -> Tensor:
    """This tensor-parallel rank's part of a weight of the whole model.

    SwiGLU's first matrix is the gate above the value, and a rank holds its part of each.
    """
    if not _is_split(parameter) or tensor.size == 1:
        return whole
    axis: int = parameter.partition_dim  # type: ignore[attr-defined]
    gated = config.gated_mlp and ".linear_fc1." in name
    halves = whole.chunk(2) if gated else (whole,)
    return torch.cat([half.chunk(tensor.size, axis)[tensor.rank] for half in halves], axis)


def whole_shape(parameter: nn.Parameter, tensor: Axis) -> list[int]:
    """Of the weight of the whole model that this rank holds a part of."""
    shape = list(parameter.shape)
    if _is_split(parameter):
        shape[parameter.partition_dim] *= tensor.size  # type: ignore[attr-defined]
    return shape


def _is_split(parameter: nn.Parameter) -> bool:
    """Do the tensor-parallel ranks share a weight?"""
    return bool(getattr(parameter, "tensor_model_parallel", False)) and getattr(parameter, "partition_dim", -1) >= 0


def _draw(name: str, shape: list[int], seed: int) -> Tensor:
    """A standard normal matrix of the whole model, fp32."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape, device="cpu").normal_(generator=generator)

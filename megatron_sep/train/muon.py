"""Muon for matrices, AdamW for the rest, as one optimizer of torch's kind; whole matrices under tensor parallelism too.

Muon (Jordan et al. 2024, as in torch.optim.Muon) takes the momentum of a matrix to the nearest matrix whose rows or
columns are orthonormal, which no part of the matrix can do for itself: tensor-parallel ranks put it together first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from megatron_sep.config.schema import OptimizerConfig
from megatron_sep.kernels.adamw import AdamW

_RMS_OF_ADAMW = 0.2
"""A matrix's update is made as large as one of AdamW, so that both share rate and decay (arXiv 2502.16982)."""


@dataclass(frozen=True)
class Blocks:
    """The matrices that lie in one weight, and how tensor-parallel ranks share each of them."""

    rows: tuple[int, ...]
    """Of each matrix, in every repetition of them; this rank's."""
    split: int | None
    """Axis that the ranks share; None: each holds all."""

    def take(self, weight: Tensor) -> list[Tensor]:
        """Each matrix of [rows, columns], this rank's part of it."""
        repeated = weight.view(-1, sum(self.rows), weight.shape[1])
        return [part.flatten(0, 1) for part in torch.split(repeated, list(self.rows), 1)]

    def put(self, parts: Iterable[Tensor]) -> Tensor:
        """The weight that has these matrices."""
        repeated = [part.view(-1, rows, part.shape[1]) for part, rows in zip(parts, self.rows, strict=True)]
        return torch.cat(repeated, 1).flatten(0, 1)


def matrices(
    named: Iterable[tuple[str, nn.Parameter]], core: TransformerConfig
) -> Iterator[tuple[nn.Parameter, Blocks]]:
    """The weights that Muon learns: matrices of the layers, not the embedding and the output.

    Query, key and value are matrices of their own, and so are SwiGLU's gate and value.
    """
    for name, parameter in named:
        if ".layers." in name and parameter.dim() == 2:
            axis = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
            yield parameter, Blocks(_rows(name, parameter, core), axis if axis >= 0 else None)


def _rows(name: str, parameter: Tensor, core: TransformerConfig) -> tuple[int, ...]:
    if name.endswith("linear_qkv.weight"):
        return core.num_attention_heads // core.num_query_groups * core.kv_channels, core.kv_channels, core.kv_channels
    if name.endswith("linear_fc1.weight") and core.gated_linear_unit:
        return (parameter.shape[0] // 2,) * 2
    return (parameter.shape[0],)


class MuonWithAdamW(Optimizer):
    """Steps fp32 weights by their ``grad``; a group with ``muon`` has a list ``blocks``, one of each weight."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: AdamW,
        config: OptimizerConfig,
        tensor_group: dist.ProcessGroup | None,
    ) -> None:
        rest = [group for group in groups if not group["muon"]]
        kind = cast(Any, adamw.kind)
        self._adamw: Optimizer = kind(
            rest, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        for group in self.param_groups:
            if not group["muon"]:
                group.update(self._adamw.defaults | adamw.settings | {"weight_decay": group["weight_decay"]})
        self._start, self._momentum, self._group = adamw.start, config.momentum, tensor_group

    def start(self) -> None:
        """The state of every weight as before the first step, so that a checkpoint's content is always the same."""
        for group in self.param_groups:
            for weight in group["params"]:
                fresh = {"momentum_buffer": torch.zeros_like(weight)} if group["muon"] else self._start(weight)
                self.state[weight].update(fresh)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Once, by the gradients as they are; ``closure`` is torch's and not taken."""
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                for weight, blocks in zip(group["params"], group["blocks"], strict=True):
                    self._turn(weight, blocks, group["lr"], group["weight_decay"])

    def _turn(self, weight: Tensor, blocks: Blocks, lr: float, decay: float) -> None:
        """One weight, with Nesterov's momentum."""
        momentum, gradient = self.state[weight]["momentum_buffer"], weight.grad
        assert gradient is not None
        momentum.lerp_(gradient, 1 - self._momentum)
        ahead = torch.lerp(gradient, momentum, self._momentum)
        update = blocks.put(self._orthogonal(part, blocks.split) for part in blocks.take(ahead))
        weight.mul_(1 - lr * decay).add_(update, alpha=-lr)

    def _orthogonal(self, part: Tensor, split: int | None) -> Tensor:
        """This rank's part of the update of a matrix, fp32, of the size of AdamW's."""
        whole = part if split is None else self._joined(part, split)
        turned: Tensor = _zeropower_via_newtonschulz(whole, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
        found = turned.to(part.dtype) * (_RMS_OF_ADAMW * max(whole.shape) ** 0.5)
        if split is None:
            return found
        return found.chunk(dist.get_world_size(self._group), split)[dist.get_rank(self._group)]

    def _joined(self, part: Tensor, split: int) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, part.contiguous(), group=self._group)
        return torch.cat(parts, split)

"""One forward pass's worth of sequences, bound to the plan of every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.context import ContextPlan, context_plans
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.parallel.share import Share


@dataclass(frozen=True)
class Microbatch:
    """B sequences of T tokens on this process's device: of its share of them under context parallelism."""

    ids_BT: Tensor
    """int64"""
    labels_BT: Tensor
    """int64: the token that follows each."""
    position_BT: Tensor
    """int64: of each token in its whole row."""
    plans: tuple[MaskPlan, ...] | tuple[ContextPlan, ...]
    """One a layer; layers of the same pattern share theirs."""
    weight_BT: Tensor | None = None
    """fp32: factor on the loss of each label; None: all count alike."""

    @classmethod
    def of(
        cls,
        ids_BT1: Tensor,
        rules: LayerRules,
        device: torch.device,
        weight_BT1: Tensor | None = None,
        share: Share | None = None,
    ) -> "Microbatch":
        """From rows of T + 1 tokens: the last T are the labels of the first T; so are the weights of the labels.

        With a ``share`` of the T tokens it is for the process that holds them. What that process needs of the others
        is then found on the host, where rows are read to, without waiting for the device.
        """
        on_device = ids_BT1.to(device, non_blocking=True)
        ids_BT, labels_BT = on_device[:, :-1].contiguous(), on_device[:, 1:].contiguous()
        position_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
        weight_BT = None if weight_BT1 is None else weight_BT1[:, 1:].to(device, non_blocking=True)
        if share is None:
            return cls(ids_BT, labels_BT, position_BT, indexed_layers(rules.plans(ids_BT)), weight_BT)
        return cls(
            ids_BT=share.take(ids_BT),
            labels_BT=share.take(labels_BT),
            position_BT=share.take(position_BT),
            plans=indexed_layers(context_plans(rules.plans(ids_BT1[:, :-1]), share, device)),
            weight_BT=None if weight_BT is None else share.take(weight_BT),
        )

    def visible_pairs(self) -> Tensor:
        """(query, key) pairs summed over rows and layers, an int64 scalar on the device."""
        plans: Sequence[MaskPlan | ContextPlan] = self.plans
        pairs = {plan: plan.num_visible().sum() for plan in dict.fromkeys(plans)}
        return torch.stack([pairs[plan] for plan in plans]).sum()

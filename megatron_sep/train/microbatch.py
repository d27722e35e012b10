"""One forward pass's worth of sequences, bound to the plan of every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.kernels.sep_attention.index import indexed_layers


@dataclass(frozen=True)
class Microbatch:
    """B sequences of T tokens on this process's device."""

    ids_BT: Tensor
    """int64"""
    labels_BT: Tensor
    """int64: the token that follows each."""
    position_BT: Tensor
    """int64: of each token in its row; [2, B, T], segments and places in them, where positions are bilevel."""
    plans: tuple[MaskPlan, ...]
    """One a layer; layers of the same pattern share theirs."""
    weight_BT: Tensor | None = None
    """fp32: factor on the loss of each label; None: all count alike."""

    @classmethod
    def of(
        cls, ids_BT1: Tensor, rules: LayerRules, device: torch.device, weight_BT1: Tensor | None = None
    ) -> "Microbatch":
        """From rows of T + 1 tokens: the last T are the labels of the first T; so are the weights of the labels."""
        ids_BT1 = ids_BT1.to(device, non_blocking=True)
        ids_BT, labels_BT = ids_BT1[:, :-1].contiguous(), ids_BT1[:, 1:].contiguous()
        weight_BT = None if weight_BT1 is None else weight_BT1[:, 1:].to(device, non_blocking=True)
        return cls(ids_BT, labels_BT, rules.positions(ids_BT), indexed_layers(rules.plans(ids_BT)), weight_BT)

    def visible_pairs(self) -> Tensor:
        """(query, key) pairs summed over rows and layers, an int64 scalar on the device."""
        pairs = {plan: plan.num_visible().sum() for plan in dict.fromkeys(self.plans)}
        return torch.stack([pairs[plan] for plan in self.plans]).sum()

"""One forward pass's worth of sequences, bound to the plan of every layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.layers import plan_layers
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan, document_numbers


@dataclass(frozen=True)
class LayerRules:
    """What turns ids into plans: a pattern a layer, and the token that ends a document where boundaries count."""

    patterns: tuple[AttentionPattern, ...]
    document_end: int | None

    def plans(self, ids_BT: Tensor) -> tuple[MaskPlan, ...]:
        document_BT = None if self.document_end is None else document_numbers(ids_BT, self.document_end)
        return plan_layers(self.patterns, ids_BT, document_BT)

    @property
    def separators(self) -> AttentionPattern:
        """The pattern whose only landmarks are the separators of the sparse layers."""
        return AttentionPattern(separator_ids=max((p.separator_ids for p in self.patterns), key=len))


@dataclass(frozen=True)
class Microbatch:
    ids_BT: Tensor
    labels_BT: Tensor
    position_BT: Tensor
    plans: tuple[MaskPlan, ...]

    @classmethod
    def of(cls, rows_BT1: Tensor, rules: LayerRules, device: torch.device) -> "Microbatch":
        """From rows of T + 1 tokens: the last T are the labels of the first T."""
        rows_BT1 = rows_BT1.to(device, non_blocking=True)
        ids_BT, labels_BT = rows_BT1[:, :-1].contiguous(), rows_BT1[:, 1:].contiguous()
        position_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
        return cls(ids_BT, labels_BT, position_BT, rules.plans(ids_BT))

    def visible_pairs(self) -> Tensor:
        """(query, key) pairs summed over rows and layers, an int64 scalar on the device."""
        pairs = {plan: plan.num_visible().sum() for plan in dict.fromkeys(self.plans)}
        return torch.stack([pairs[plan] for plan in self.plans]).sum()

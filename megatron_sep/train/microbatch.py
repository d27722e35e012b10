"""One forward pass's worth of sequences, and the plan of every layer for them."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.kernels.sep_attention.index import indexed_layers


@dataclass(frozen=True, eq=False)
class Microbatch:
    """B rows of T + 1 tokens on this process's device; the last T are the labels of the first T."""

    rows_BT1: Tensor
    """int64"""
    rules: LayerRules
    weights_BT1: Tensor | None = None
    """fp32: factor on the loss of each token as a label; None: all count alike."""

    @classmethod
    def of(
        cls, ids_BT1: Tensor, rules: LayerRules, device: torch.device, weight_BT1: Tensor | None = None
    ) -> "Microbatch":
        """From rows and weights of any device."""
        weights_BT1 = None if weight_BT1 is None else weight_BT1.to(device, non_blocking=True)
        return cls(ids_BT1.to(device, non_blocking=True), rules, weights_BT1)

    @property
    def kind(self) -> Hashable:
        """What two micro-batches share that differ in nothing but numbers: they are computed by the same kernels."""
        return self.rows_BT1.shape, self.rules, self.weights_BT1 is None

    @cached_property
    def ids_BT(self) -> Tensor:
        """int64"""
        return self.rows_BT1[:, :-1].contiguous()

    @cached_property
    def labels_BT(self) -> Tensor:
        """int64: the token that follows each."""
        return self.rows_BT1[:, 1:].contiguous()

    @cached_property
    def weight_BT(self) -> Tensor | None:
        """fp32: factor on the loss of each label; None: all count alike."""
        return None if self.weights_BT1 is None else self.weights_BT1[:, 1:]

    @cached_property
    def position_BT(self) -> Tensor:
        """int64: of each token in its row; [2, B, T], segments and places in them, where positions are bilevel."""
        return self.rules.positions(self.ids_BT)

    @cached_property
    def plans(self) -> tuple[MaskPlan, ...]:
        """One a layer, ready for the kernels; layers of the same pattern share theirs."""
        return indexed_layers(self._plans)

    @cached_property
    def _plans(self) -> tuple[MaskPlan, ...]:
        return self.rules.plans(self.ids_BT)

    def visible_pairs(self) -> Tensor:
        """(query, key) pairs summed over rows and layers, an int64 scalar on the device."""
        pairs = {plan: plan.num_visible().sum() for plan in dict.fromkeys(self._plans)}
        return torch.stack([pairs[plan] for plan in self._plans]).sum()

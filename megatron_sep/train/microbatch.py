"""One forward pass's worth of sequences, and the plan of every layer for them."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_sep.attention.context import ContextPlan, context_plans
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.attention.rules import LayerRules
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.parallel.share import Share


@dataclass(frozen=True, eq=False)
class Microbatch:
    """B rows of T + 1 tokens on this process's device; the last T are the labels of the first T.

    Under context parallelism the model's part of them, ids and plans, are those of this process's share.
    """

    rows_BT1: Tensor
    """int64"""
    rules: LayerRules
    weights_BT1: Tensor | None = None
    """fp32: factor on the loss of each token as a label; None: all count alike."""
    share: Share | None = None
    """Which of the T tokens this process holds; None: all of them."""
    read_BT1: Tensor | None = None
    """The rows where they were read to: what a process needs of the others is found there, not on the device."""

    @classmethod
    def of(
        cls,
        ids_BT1: Tensor,
        rules: LayerRules,
        device: torch.device,
        weight_BT1: Tensor | None = None,
        share: Share | None = None,
    ) -> "Microbatch":
        """From rows and weights of any device."""
        weights_BT1 = None if weight_BT1 is None else weight_BT1.to(device, non_blocking=True)
        read_BT1 = None if share is None else ids_BT1.cpu()
        return cls(ids_BT1.to(device, non_blocking=True), rules, weights_BT1, share, read_BT1)

    @property
    def kind(self) -> Hashable:
        """What two micro-batches share that differ in nothing but numbers: they are computed by the same kernels."""
        return self.rows_BT1.shape, self.rules, self.weights_BT1 is None

    @cached_property
    def ids_BT(self) -> Tensor:
        """int64: of this process's tokens, as all that follows."""
        return self._held(self.rows_BT1[:, :-1])

    @cached_property
    def labels_BT(self) -> Tensor:
        """int64: the token that follows each."""
        return self._held(self.rows_BT1[:, 1:])

    @cached_property
    def weight_BT(self) -> Tensor | None:
        """fp32: factor on the loss of each label; None: all count alike."""
        return None if self.weights_BT1 is None else self._held(self.weights_BT1[:, 1:])

    @cached_property
    def position_BT(self) -> Tensor:
        """int64: of each token in its whole row; [2, B, T], segments and places, where positions are bilevel."""
        return self._held(self.rules.positions(self.rows_BT1[:, :-1].contiguous()))

    @cached_property
    def plans(self) -> tuple[MaskPlan, ...] | tuple[ContextPlan, ...]:
        """One a layer, ready for the kernels; layers of the same pattern share theirs."""
        return indexed_layers(self._plans)

    @cached_property
    def _plans(self) -> tuple[MaskPlan, ...] | tuple[ContextPlan, ...]:
        if self.share is None or self.read_BT1 is None:
            return self.rules.plans(self.ids_BT)
        return context_plans(self.rules.plans(self.read_BT1[:, :-1]), self.share, self.rows_BT1.device)

    def _held(self, values_BT: Tensor) -> Tensor:
        return values_BT.contiguous() if self.share is None else self.share.take(values_BT)

    def visible_pairs(self) -> Tensor:
        """(query, key) pairs summed over rows and layers, an int64 scalar on the device."""
        plans: Sequence[MaskPlan | ContextPlan] = self._plans
        pairs = {plan: plan.num_visible().sum() for plan in dict.fromkeys(plans)}
        return torch.stack([pairs[plan] for plan in plans]).sum()

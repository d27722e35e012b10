"""Gradients reduced over the data-parallel ranks bucket by bucket, while the backward pass goes on to the next one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

Accumulate = Callable[[list[Tensor], list[Tensor]], None]
"""Puts gradients into their fp32 sums: ``(sums, gradients)``."""


class _Bucket:
    """Of megatron-core's, whose fp32 sums lie side by side and are reduced in one call."""

    def __init__(self, group: Any, accumulate: Accumulate) -> None:
        self.weights: list[Any] = [weight for bucket in group.buckets for weight in bucket.params_list]
        self.begun = False
        self._group, self._accumulate = group, accumulate
        self._found: dict[Any, Tensor] = {}
        group.reset()  # newer versions would else not wait for a second reduction

    def take(self, weight: Any, gradient: Tensor) -> None:
        """The last one to come begins the reduction."""
        self._found[weight] = gradient
        if len(self._found) == len(self.weights):
            self.begun = True
            self._accumulate([weight.main_grad for weight in self._found], list(self._found.values()))
            self._group.start_grad_sync()


def begin_reductions(model: DistributedDataParallel, loss: Tensor, accumulate: Accumulate) -> None:
    """The backward pass of ``loss``, a scalar; ``model.finish_grad_sync()`` is to follow.

    ``model`` was made with ``overlap_grad_reduce``. A CUDA graph may record both calls: weights and sums stay where
    they are, and every rank begins its reductions in one order, that of the backward pass.
    """
    buckets = [_Bucket(group, accumulate) for group in model.bucket_groups]
    owners = [(weight, bucket) for bucket in buckets for weight in bucket.weights]
    hooks = [weight.register_hook(partial(bucket.take, weight)) for weight, bucket in owners]
    try:
        gradients = torch.autograd.grad(loss, [weight for weight, _ in owners], materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    for (weight, bucket), gradient in zip(owners, gradients, strict=True):
        if not bucket.begun:  # no gradient came to one of its weights: zeros
            bucket.take(weight, gradient)

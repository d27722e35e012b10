"""What attention pays to which kind of key while a model is trained, from forward passes that change nothing."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sep.attention.key_kinds import KINDS, KeyKinds, counted_separators
from megatron_sep.attention.pattern import MaskPlan, is_separator
from megatron_sep.config.mass import first_and_near
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.data.resolved import Resolved
from megatron_sep.kernels.sep_attention.scores import DistanceBias, weights
from megatron_sep.model.core_attention import SepCoreAttention
from megatron_sep.model.decoder_layer import DecoderLayer
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine
from megatron_sep.train.feed import Feed
from megatron_sep.train.microbatch import Microbatch

GROUPS = ("full", "sep")
"""Layers that see everything, and those of the pattern."""
ROWS = 4
"""Of a micro-batch that are looked at."""
_SCORES = 2**24
"""Held at once."""


class AttentionMass:
    """Watches the attention of one pass, and shares it out among kinds of keys, over all ranks."""

    def __init__(self, engine: Engine, attention: AttentionConfig, resolved: Resolved, topology: Topology) -> None:
        """Raises EngineError, SeparatorError."""
        self._engine, self._layers = engine, _layers(engine)
        self._kinds, self._topology = KeyKinds(*first_and_near(attention)), topology
        self._separators = counted_separators(attention, resolved.tokenizer)
        self._groups = [int(pattern.evicts) for pattern in resolved.rules.patterns]

    def values(self, feed: Feed, step: int) -> dict[str, float]:
        """Shares by group of layers and kind of key, such as attention/mass/sep/separators; those of a group add up
        to 1. A group without layers, or with no query behind the window, has none. The device is waited for.
        """
        count = self._topology.pipeline.size if self._topology.chunks > 1 else 1
        batches = list(feed.first(step, count))
        paid_G5 = torch.zeros(len(GROUPS), len(KINDS) + 1, dtype=torch.float64, device=self._topology.device)
        with torch.compiler.set_stance("force_eager"), self._watching(batches, paid_G5):
            self._engine.look(batches, count)
        dist.all_reduce(paid_G5)
        return {
            f"attention/mass/{group}/{kind}": share / counted
            for group, (*shares, counted) in zip(GROUPS, paid_G5.tolist(), strict=True)
            for kind, share in zip(KINDS, shares, strict=True)
            if counted
        }

    @contextmanager
    def _watching(self, batches: list[Microbatch], paid_G5: Tensor) -> Iterator[None]:
        """Each layer meets the micro-batches in their order; hooks see them, and are gone afterwards."""
        with ExitStack() as hooks:
            for layer in self._layers:
                ids = iter([batch.ids_BT for batch in batches])
                attention = layer.self_attention.core_attention
                see = partial(self._see, ids, paid_G5[self._groups[layer.layer_number - 1]])
                hooks.callback(attention.register_forward_pre_hook(see, with_kwargs=True).remove)
            yield

    def _see(
        self, ids: Iterator[Tensor], paid_5: Tensor, attention: Any, words: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Adds what a call of the core attention pays."""
        given = inspect.signature(attention.forward).bind(*words, **named).arguments
        q_BHTD, k_BHTD = (given[name].permute(1, 2, 0, 3)[:ROWS].float() for name in ("q_SBHD", "k_SBHD"))
        plan, bias = given["attention_mask"], given.get("attention_bias")
        ids_BT = next(ids)[:ROWS]
        place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        if plan.start_BT is not None:
            place_BT = place_BT - plan.start_BT[:ROWS]
        separator_BT = is_separator(ids_BT, self._separators)
        for queries, weights_BHQT in _weights(attention, q_BHTD, k_BHTD, plan, bias):
            paid_5 += self._kinds.paid(weights_BHQT, place_BT, separator_BT, queries)


def _weights(
    attention: SepCoreAttention, q_BHTD: Tensor, k_BHTD: Tensor, plan: MaskPlan, bias: DistanceBias | None
) -> Iterator[tuple[range, Tensor]]:
    """fp32 [B, H, Q, T] of consecutive queries."""
    batch, heads, tokens, _ = q_BHTD.shape
    k_BHTD = k_BHTD.repeat_interleave(heads // k_BHTD.shape[1], 1)
    length = max(1, _SCORES // (batch * heads * tokens))
    for first in range(0, tokens, length):
        queries = range(first, min(first + length, tokens))
        part = plan.of_queries(queries)
        scores_BHQT = q_BHTD[:, :, queries.start : queries.stop] @ k_BHTD.mT * attention.scale
        if bias is not None:
            scores_BHQT = scores_BHQT + bias.dense(part)[:batch]
        yield queries, weights(scores_BHQT, part.dense()[:batch, None], None)


def _layers(engine: Engine) -> list[DecoderLayer]:
    """This rank's."""
    return [module for part in engine.decoders for module in part.modules() if isinstance(module, DecoderLayer)]

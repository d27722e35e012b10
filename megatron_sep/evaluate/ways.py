"""The logits of one text by every way that this program computes a model: what `verify` holds against each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.rules import LayerRules
from megatron_sep.convert.check import export_model, own_logits
from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import attach
from megatron_sep.generate.load import load, with_positions
from megatron_sep.model.operations import operations_table, training_call
from megatron_sep.parallel.topology import Topology
from megatron_sep.weights.export import export_rules
from megatron_sep.weights.open_source import OpenedSource
from megatron_sep.weights.rope_scaling import HuggingFaceError

DECODED = 96
"""Tokens at the end of a text that are read one at a time."""
FUSED = "triton"


@dataclass(frozen=True)
class Left:
    """A way that was not taken, and why."""

    why: str


@dataclass(frozen=True)
class Ways:
    """How one set of weights can be computed, in fp32; every way gives [T, V] or says why it was left out."""

    source: OpenedSource
    tokenizer: Tokenizer
    rules: LayerRules
    ids_1T: Tensor
    topology: Topology

    @torch.no_grad()
    def trained(self) -> Tensor:
        """By the model that is trained, under the reference's mask."""
        return own_logits(self.source, [self.rules], self.ids_1T, self.topology)[0][0]

    def others(self) -> dict[str, Callable[[], list[Tensor] | Left]]:
        """All other ways; what one call loads, it computes both at once and through its cache."""
        return {"fused training": self._fused, "prefill, decoded": self._cached, "export, export decoded": self._export}

    @torch.no_grad()
    def _fused(self) -> list[Tensor] | Left:
        call = training_call(self.source.config, self.topology.device, torch.float32, 1)
        table = operations_table()["sep_attention"].implementations
        why_not = next(row for row in table if row.name == FUSED).why_not(call)
        if why_not:
            return Left(why_not)
        return [own_logits(self.source, [self.rules], self.ids_1T, self.topology, FUSED)[0][0]]

    @torch.no_grad()
    def _cached(self) -> list[Tensor] | Left:
        device = self.topology.device
        if self.source.own:
            model = with_positions(self.source, self.tokenizer, device, torch.float32)
        else:
            model = load(self.source.place, device, torch.float32).model
        attached = attach(model, list(self.rules.patterns), document_end=self.rules.document_end)
        return [self._read(model, attached.new_cache(), decoded) for decoded in (0, DECODED)]

    @torch.no_grad()
    def _export(self) -> list[Tensor] | Left:
        try:
            model = export_model(self.source, export_rules(self.source), self.topology.device)
        except HuggingFaceError as error:
            return Left(str(error))
        return [model(self.ids_1T, use_cache=False).logits[0].float(), self._read(model, None, DECODED)]

    def _read(self, model: Any, cache: Any, decoded: int) -> Tensor:
        """The last ``decoded`` tokens one by one, those before them in two parts."""
        length = self.ids_1T.shape[1]
        prompt = max(1, length - decoded) if decoded else length
        parts = [prompt // 2, prompt - prompt // 2, *[1] * (length - prompt)] if decoded else [length]
        logits, name = [], cache_name(model)
        for part in torch.split(self.ids_1T, [size for size in parts if size], dim=1):
            output = model(part, use_cache=True, **{name: cache})
            cache = output[name]
            logits.append(output.logits[0].float())
        return torch.cat(logits)

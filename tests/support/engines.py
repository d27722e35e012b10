"""Engines for tests of what an engine is used by."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.config.schema import OptimizerConfig
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine, StepResult
from megatron_sep.train.microbatch import Microbatch


@dataclass(frozen=True)
class Files:
    """A save that is over."""

    files: tuple[Path, ...]

    def done(self) -> bool:
        return True

    def finish(self) -> Sequence[Path]:
        return self.files


class WeightsOnly:
    """Saves a model's weights as megatron-core's engine does, and has no optimizer."""

    name = "megatron"

    def __init__(self, model: Any) -> None:
        self.model = model

    def begin_save(self, folder: Path) -> Files:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save({"model": self.model.sharded_state_dict()}, str(folder))
        return Files(tuple(folder.iterdir()))


class PlainEngine(Engine):
    """torch's AdamW on one process in fp32, its state in one file: a second engine in as few lines as can be."""

    name = "plain"

    def __init__(self, model: Any, topology: Topology, optimizer: OptimizerConfig, **_: Any) -> None:
        self._model, self._topology, self._config = model, topology, optimizer
        self._optimizer = torch.optim.AdamW(
            model.parameters(), betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    def forward_backward(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        self._model.train()
        self._optimizer.zero_grad()
        total = torch.zeros(())
        for batch in microbatches:
            loss = self._loss(batch) / count
            loss.backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        self._model.eval()
        return torch.stack([self._loss(batch) for batch in microbatches]).sum() / count

    def step(self, lr: float) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.clip_grad)
        if math.isfinite(float(norm)):
            self._optimizer.step()
        return StepResult(norm)

    def loss_scale(self) -> float:
        return 1.0

    def begin_save(self, folder: Path) -> Files:
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / "plain.pt")
        return Files((folder / "plain.pt",))

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "plain.pt", weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _loss(self, batch: Microbatch) -> Tensor:
        return self._model(batch.ids_BT, batch.position_BT, batch.plans, labels=batch.labels_BT).float().mean()

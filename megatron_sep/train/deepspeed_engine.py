"""Forward, backward and step of data-parallel ranks with DeepSpeed's ZeRO (arXiv 1910.02054).

Its checkpoints are those of ``MegatronEngine``: each weight whole, under its name, with the fp32 weight and the moments
of AdamW beside it. So each engine goes on where the other stopped, on any number of ranks.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed import ops
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megatron_sep.config.schema import LossScaleConfig, OptimizerConfig
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.model.decoder import Decoder
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.engine import Engine, StepResult
from megatron_sep.train.megatron_files import PLAIN, MegatronWriting
from megatron_sep.train.microbatch import Microbatch
from megatron_sep.weights.checkpoint_files import OPTIMIZER_STATE, CheckpointFiles
from megatron_sep.weights.sealed import CheckpointError

Tree = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")
_LARGEST_BUCKET = 500_000_000
"""Gradients that are reduced together; DeepSpeed's own default."""
_SETTINGS_OF_GROUP = {"is_expert_parallel": False, "default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False}
"""By these and by ``wd_mult`` megatron-core knows a group of parameters again."""


class DeepSpeedEngine(Engine):
    """Trains one Decoder by ZeRO 1 (optimizer state split over the ranks), 2 (gradients too) or 3 (weights too)."""

    name = "deepspeed"
    reads = ("megatron",)

    def __init__(
        self,
        model: Decoder,
        topology: Topology,
        optimizer: OptimizerConfig,
        *,
        precision: str,
        loss_scale: LossScaleConfig,  # noqa: ARG002  # of fp16, which the configuration refuses here
        sequence_length: int,  # noqa: ARG002
        micro_batch_size: int,
        cuda_graphs: str,  # noqa: ARG002  # "on" is refused, too
        zero_stage: int,
    ) -> None:
        self._topology, self._config, self._stage = topology, optimizer, zero_stage
        self._parameters = dict(model.named_parameters())
        self._frames = _frames(model)
        self._decays = {name: parameter.dim() > 1 for name, parameter in self._parameters.items()}
        adamw: AdamW = model.operations.adamw
        settings = _settings(model, optimizer, precision, zero_stage, micro_batch_size)
        self._engine = _initialise(model, self._optimizer(adamw), settings)
        self._zero = self._engine.optimizer
        for partition in self._partitions():
            self._zero.optimizer.state[partition].update(adamw.start(partition))
        if zero_stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        self._gather_vectors()

    def _optimizer(self, adamw: AdamW) -> torch.optim.Optimizer:
        """Matrices decay, biases and norms do not: the groups of megatron-core."""
        groups = [
            {
                "params": [parameter for name, parameter in self._parameters.items() if self._decays[name] == decays],
                "wd_mult": float(decays),
                **adamw.settings,
            }
            for decays in (True, False)
        ]
        config, kind = self._config, cast(Any, adamw.kind)
        made: torch.optim.Optimizer = kind(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        return made

    def _partitions(self) -> list[Tensor]:
        """This rank's fp32 weights, flat."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return [partition for group in self._zero.optimizer.param_groups for partition in group["params"]]

    def _gather_vectors(self) -> None:
        """Under ZeRO 3: have biases and norms whole on every rank, for a layer uses those of its parts itself.

        DeepSpeed gathers them after each step again; while it learns the order of modules it would let go of them.
        """
        kept = self._zero.persistent_parameters if self._stage == 3 else []
        for vector in kept:
            vector.is_external_param = True
        if kept:
            kept[0].all_gather(kept)

    def forward_backward(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """Gradients of the mean loss of ``count`` micro-batches; returns that loss over all ranks, an fp32 scalar."""
        self._engine.train()
        total = torch.zeros((), device=self._topology.device)
        for number, batch in enumerate(microbatches, 1):
            self._engine.set_gradient_accumulation_boundary(number == count)
            loss = self._loss(batch)
            total += loss.detach()
            self._engine.backward(loss / count, scale_wrt_gas=False)
            if number < count:
                self._engine.step()
        return self._topology.mean_over_last_stages(total / count)

    @property
    def decoders(self) -> Sequence[Decoder]:
        """The only one."""
        return (self._engine.module,)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """The mean loss of ``count`` micro-batches over all ranks, an fp32 scalar."""
        self._engine.eval()
        total = torch.stack([self._loss(batch) for batch in microbatches]).sum()
        return self._topology.mean_over_last_stages(total / count)

    def _loss(self, batch: Microbatch) -> Tensor:
        loss_BT: Tensor = self._engine(batch.ids_BT, batch.position_BT, batch.plans, labels=batch.labels_BT).float()
        return (loss_BT if batch.weight_BT is None else loss_BT * batch.weight_BT).mean()

    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradients, unless one of them is not finite on any rank."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if self._engine.was_step_applied() else math.inf
        return StepResult(torch.as_tensor(norm, dtype=torch.float32, device=self._topology.device))

    def loss_scale(self) -> float:
        """1: there is no fp16 here."""
        return 1.0

    def begin_save(self, folder: Path) -> MegatronWriting:
        """In torch's distributed format, through megatron-core, from a copy on the host.

        The ranks take turns in holding a weight, which they put together one at a time.
        """
        return MegatronWriting(self._state(), folder, self._topology.process.rank)

    def _state(self) -> Tree:
        """This rank's share of the weights and of the optimizer's state, as ``MegatronEngine`` names them."""
        weights, moments = {}, {}
        for number, (name, parameter) in enumerate(self._parameters.items()):
            found = {"param": safe_get_full_fp32_param(parameter)}
            found |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            if number % self._topology.process.size == self._topology.process.rank:
                frame = self._frames[name]
                weights[name] = _filled(frame, frame.key, found["param"].to("cpu", parameter.dtype))
                moments[number] = {
                    key: _filled(frame, f"{OPTIMIZER_STATE}.{key}.{frame.key}", value.cpu())
                    for key, value in found.items()
                }
        return {"model": weights, "optimizer": self._settings() | {"param_state": moments}}

    def _settings(self) -> Tree:
        """What megatron-core saves of an optimizer beside its tensors."""
        state = self._zero.optimizer.state
        step = next(float(state[partition]["step"]) for partition in self._partitions())
        groups = [
            {key: value for key, value in group.items() if key != "params"} | _SETTINGS_OF_GROUP | {"step": step}
            for group in self._zero.optimizer.param_groups
        ]
        rates = {"max_lr": self._config.lr, "min_lr": self._config.min_lr}
        return {
            "optimizer": {"param_groups": [group | rates for group in groups]},
            "param_state_sharding_type": "fully_reshardable",
        }

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """On this or another number of ranks, one weight at a time. No code of the files runs."""
        states = {key: CheckpointFiles(folder, key) for key in ("param", *MOMENTS)}
        _check_names(folder, states, self._parameters)
        for name, parameter in self._parameters.items():
            for key, files in states.items():
                whole = files.tensor(name).to(self._topology.device, torch.float32)
                self._put(parameter, key, whole)
        step = _steps_in(folder)
        for partition in self._partitions():
            self._zero.optimizer.state[partition]["step"].fill_(step)
        self._gather_vectors()

    def _put(self, parameter: nn.Parameter, key: str, whole: Tensor) -> None:
        """Into this rank's part of what the optimizer holds of a weight, and into the weight itself."""
        value = _part(parameter, whole) if self._stage == 3 else whole
        if key != "param":
            put = safe_set_local_optimizer_state if self._stage == 3 else safe_set_full_optimizer_state
            put(parameter, value, key)
            return
        (safe_set_local_fp32_param if self._stage == 3 else safe_set_full_fp32_param)(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
            parameter.copy_(whole)


def _frames(model: Decoder) -> Tree:
    """How megatron-core saves each weight, by name: its key, its place in a stack of layers."""
    saved = model.sharded_state_dict().values()
    by_weight = {id(frame.data): frame for frame in saved if isinstance(getattr(frame, "data", None), Tensor)}
    frames = {name: by_weight[id(parameter)] for name, parameter in model.named_parameters()}
    return {name: replace(frame, replica_id=(0, 0, 0)) for name, frame in frames.items()}


def _filled(frame: Any, key: str, value: Tensor) -> Any:
    typed = {"dtype": value.dtype} if hasattr(frame, "dtype") else {}
    return replace(frame, key=key, data=value, **typed)


def _settings(model: Decoder, optimizer: OptimizerConfig, precision: str, stage: int, micro_batch_size: int) -> Tree:
    """DeepSpeed's configuration: gradients summed and sent in fp32, as the other engine does."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand
        "gradient_clipping": optimizer.clip_grad,
        "bf16": {"enabled": precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": min(_LARGEST_BUCKET, weights),
            "stage3_param_persistence_threshold": 10 * model.config.hidden_size,
        },
    }


def _initialise(model: Decoder, optimizer: torch.optim.Optimizer, settings: Tree) -> Any:
    """DeepSpeed's engine, in the job that has begun; it compiles nothing of its own, for nothing of that is used."""
    vars(ops).setdefault("__compatible_ops__", {})
    os.environ.setdefault("LOCAL_RANK", "0")
    logger.setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def _part(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a weight under ZeRO 3: an equal share of its elements, the last one filled up with zeros."""
    share, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    part = torch.zeros(share, device=whole.device)
    found = whole.flatten()[rank * share : (rank + 1) * share]
    part[: found.numel()] = found
    return part


def _check_names(folder: Path, states: dict[str, CheckpointFiles], names: Iterable[str]) -> None:
    missing = list(_missing(states, names))
    if missing:
        raise CheckpointError(f"{folder}: has no {missing[0]}; it was written by another optimizer than AdamW")


def _missing(states: dict[str, CheckpointFiles], names: Iterable[str]) -> Iterator[str]:
    for key, files in states.items():
        there = files.shapes()
        yield from (f"{OPTIMIZER_STATE}.{key}.{name}" for name in names if name not in there)


def _steps_in(folder: Path) -> float:
    """How often AdamW had been applied."""
    common = torch.load(folder / PLAIN, weights_only=True)
    return float(common["optimizer"]["optimizer"]["param_groups"][0]["step"])

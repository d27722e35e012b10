"""megatron-core's engine with Muon, whose matrices are whole, and its state with them, on every data-parallel rank."""

import math
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from megatron_sep.config.schema import LossScaleConfig
from megatron_sep.train.engine import StepResult
from megatron_sep.train.megatron_engine import MegatronEngine, Tree
from megatron_sep.train.muon import MuonWithAdamW, matrices
from megatron_sep.weights.checkpoint_files import OPTIMIZER_STATE

_STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""Of a weight; those that it has are saved."""


class MuonEngine(MegatronEngine):
    """Trains one Decoder with Muon and AdamW under data, tensor, sequence and pipeline parallelism."""

    splits_optimizer = False

    def _make_optimizer(self, precision: str, loss_scale: LossScaleConfig) -> MegatronOptimizer:  # noqa: ARG002
        """Muon for the matrices of the layers, AdamW for the rest, on fp32 weights; ``loss_scale`` is of fp16."""
        named = [item for model in self._weights for item in model.named_parameters() if item[1].requires_grad]
        turned = dict(matrices(named, self._weights[0].config))
        tables = [weight for _, weight in named if weight not in turned and weight.dim() > 1]
        vectors = [weight for _, weight in named if weight.dim() == 1]
        groups: list[dict[str, Any]] = [
            {"params": list(turned), "blocks": list(turned.values()), "muon": True, "wd_mult": 1.0},
            {"params": tables, "muon": False, "wd_mult": 1.0},
            {"params": vectors, "muon": False, "wd_mult": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        made = MuonWithAdamW(groups, self._adamw, self._config, self._topology.tensor_group)
        core = CoreOptimizerConfig(optimizer="adam", lr=self._config.lr, bf16=precision == "bf16")
        optimizer = (
            FP32Optimizer(made, core, None)
            if precision == "fp32"
            else Float16OptimizerWithFloat16Params(made, core, None, None)
        )
        made.start()
        return optimizer

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradients, unless one of them is not finite on any rank."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        self._optimizer.prepare_grads()
        norm = self._grad_norm()
        if math.isfinite(float(norm)):
            if self._config.clip_grad:
                clip_grads_with_norm_(self._optimizer.get_parameters(), self._config.clip_grad, norm)
            self._optimizer.step_with_ready_grads()
        return StepResult(norm)

    def _state(self, loading: bool = False) -> Tree:  # noqa: ARG002  # the same frame for both
        """Weights as megatron-core saves them, and under each one's name its fp32 copy and what its optimizer keeps."""
        weights = self._saved_weights()
        frames = {id(frame.data): frame for frame in nested_values(weights) if isinstance(frame.data, Tensor)}
        found = {
            number: {key: _framed(frames[id(weight)], key, value) for key, value in self._held(weight).items()}
            for number, weight in enumerate(self._all_weights())
        }
        groups = {"param_groups": [{"step": self._steps}]}
        return {"model": weights, "optimizer": {"optimizer": groups, "param_state": found}}

    def _all_weights(self) -> list[nn.Parameter]:
        return [weight for model in self._weights for weight in model.parameters()]

    def _held(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """The fp32 weight and the optimizer's state of it."""
        master = getattr(weight, "main_param", weight)
        state = self._optimizer.optimizer.state[master]
        return {"param": master} | {key: state[key] for key in _STATES if key in state}

    @property
    def _steps(self) -> float:
        """How often AdamW has been applied on this rank; what the first rank says is saved."""
        return next(
            (float(state["step"]) for state in self._optimizer.optimizer.state.values() if "step" in state), 0.0
        )

    @torch.no_grad()
    def _take_over(self, state: Tree) -> None:
        self._load_weights(state["model"])
        for number, weight in enumerate(self._all_weights()):
            for key, value in self._held(weight).items():
                value.copy_(state["optimizer"]["param_state"][number][key])
        (group,) = state["optimizer"]["optimizer"]["param_groups"]
        for kept in self._optimizer.optimizer.state.values():
            if "step" in kept:
                kept["step"].fill_(group["step"])


def _framed(frame: Any, key: str, value: Tensor) -> Any:
    typed = {"dtype": value.dtype} if hasattr(frame, "dtype") else {}
    return replace(frame, key=f"{OPTIMIZER_STATE}.{key}.{frame.key}", data=value, **typed)

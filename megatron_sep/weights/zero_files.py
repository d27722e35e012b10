"""The optimizer of a GPT-NeoX checkpoint: DeepSpeed's ZeRO stage 1 and 2, fp32 weights and Adam's moments.

Each data-parallel rank wrote one file with its part of every group of parameters. A group is all its parameters, flat,
one after another in the order of `param_shapes`, cut into parts of one length, the last one padded.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sep.config.schema import ModelConfig
from megatron_sep.weights.neox_layers import hugging_face_name
from megatron_sep.weights.source import Source
from megatron_sep.weights.tensor_files import UNREADABLE, Shape, WeightsError

Tree = dict[str, Any]
KINDS = ("param", "exp_avg", "exp_avg_sq")
"""fp32 weights, first and second moments."""
_PART = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_STATE = "mp_rank_00_model_states.pt"


class _Told:
    """In the place of what DeepSpeed pickles beside tensors: its attributes, and none of its code."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def _reconstruct() -> Any:
    return np.zeros(0).__reduce__()[0]


_ALLOWED: list[Any] = [
    *((_Told, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")),
    (_Told, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_reconstruct(), "numpy.core.multiarray._reconstruct"),
    (_reconstruct(), "numpy._core.multiarray._reconstruct"),
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    type(np.dtype(np.uint32)),
]
"""What the files hold beside tensors, dicts and numbers: loss scale, stage, and numpy's random state."""


class ZeroOptimizer:
    """The optimizer's state by weight, under Hugging Face's names. Raises WeightsError for another layout."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder, self._config = folder, config
        state = _load(folder / _MODEL_STATE)
        shapes = state.get("param_shapes")
        if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
            raise WeightsError(
                f"{folder / _MODEL_STATE}: has no param_shapes, a list of groups, as ZeRO stage 1 of DeepSpeed from "
                "0.6.5 writes; set checkpoint.init_optimizer=false to start with a new optimizer"
            )
        self._groups: list[dict[str, Shape]] = [
            {hugging_face_name(name, config.num_layers): tuple(shape) for name, shape in group.items()}
            for group in shapes
        ]
        parts = [_load(path)["optimizer_state_dict"] for path in _parts(folder)]
        self.steps = _steps(parts[0], folder)
        self._flat = {kind: [_joined(parts, kind, g) for g in range(len(self._groups))] for kind in KINDS}
        self._check()

    def source(self, kind: str, vocab_size: int) -> Source:
        """One of KINDS under our names, every name and shape checked."""
        config = self._config.model_copy(update={"vocab_size": vocab_size})
        return Source(self.folder, config, _OneKind(self._groups, self._flat[kind]), named_as_ours=False)

    def _check(self) -> None:
        for number, group in enumerate(self._groups):
            needed = sum(map(prod, group.values()))
            for kind in KINDS:
                found = self._flat[kind][number].numel()
                if found < needed:
                    raise WeightsError(
                        f"{self.folder}: {kind} of parameter group {number} has {found} values, its shapes need "
                        f"{needed}: files of some ranks are missing"
                    )


class _OneKind:
    """A kind of tensors, as ``Files``."""

    def __init__(self, groups: list[dict[str, Shape]], flat: list[Tensor]) -> None:
        self._shapes = {name: shape for group in groups for name, shape in group.items()}
        self._where = {name: (group, begin) for name, group, begin in _places(groups)}
        self._flat = flat

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def tensor(self, name: str) -> Tensor:
        group, begin = self._where[name]
        shape = self._shapes[name]
        return self._flat[group][begin : begin + prod(shape)].view(shape)


def _places(groups: list[dict[str, Shape]]) -> Iterator[tuple[str, int, int]]:
    for number, group in enumerate(groups):
        begin = 0
        for name, shape in group.items():
            yield name, number, begin
            begin += prod(shape)


def _parts(folder: Path) -> list[Path]:
    """The files of the data-parallel ranks, in order."""
    found = {match: path for path in folder.iterdir() if (match := _PART.fullmatch(path.name))}
    if not found:
        raise WeightsError(
            f"{folder}: has no zero_pp_rank_N_mp_rank_00_optim_states.pt; set checkpoint.init_optimizer=false to start "
            "with a new optimizer"
        )
    strange = [path.name for match, path in found.items() if match[1] or int(match[3])]
    if strange:
        raise WeightsError(
            f"{folder / strange[0]}: is of DeepSpeed's bf16 optimizer or of one of several model-parallel parts, which "
            "are not taken over; set checkpoint.init_optimizer=false to start with a new optimizer"
        )
    ranked = sorted((int(match[2]), path) for match, path in found.items())
    if [rank for rank, _ in ranked] != list(range(len(ranked))):
        raise WeightsError(f"{folder}: has the ranks {[rank for rank, _ in ranked]} of the optimizer; one is missing")
    return [path for _, path in ranked]


def _joined(parts: list[Tree], kind: str, group: int) -> Tensor:
    """All ranks' values of a group, one after another."""
    if kind == "param":
        return torch.cat([part["single_partition_of_fp32_groups"][group].flatten().float() for part in parts])
    return torch.cat([_adam(part, group)[kind].flatten().float() for part in parts])


def _adam(part: Tree, group: int) -> Tree:
    base = part["base_optimizer_state"]
    found: Tree = base[group] if isinstance(base, list) else base["state"][group]
    return found


def _steps(part: Tree, folder: Path) -> int:
    """How often Adam has stepped."""
    base = part.get("base_optimizer_state")
    try:
        groups = [] if base is None or isinstance(base, list) else base["param_groups"]
        named = [value for value in (_adam(part, 0).get("step"), *(group.get("step") for group in groups)) if value]
        part["single_partition_of_fp32_groups"]
    except (KeyError, TypeError, IndexError) as error:
        raise WeightsError(
            f"{folder}: its optimizer is of another layout than ZeRO stage 1's of DeepSpeed from 0.6.5 ({error}); set "
            "checkpoint.init_optimizer=false to start with a new optimizer"
        ) from error
    return int(named[0]) if named else 0


def _load(path: Path) -> Tree:
    """Through torch's restricted unpickler: tensors, plain values, and stand-ins for a few names."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except UNREADABLE as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise WeightsError(f"{path}: is damaged, or holds something that is not read: {why}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not a checkpoint of DeepSpeed")
    return found

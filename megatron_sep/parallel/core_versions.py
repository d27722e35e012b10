"""What differs between the versions of megatron-core that this project runs on, and what of it is private to it."""

import logging
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor

_UNHEARD = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""Loggers, and how the warnings of theirs begin that say nothing to a user."""

PRIVATE_NAMES = {
    "torch": {
        "torch._C._distributed_c10d:HashStore": "2.11 to 2.15",
        "torch._dynamo.config:recompile_limit": "2.11 to 2.15",
        "torch._inductor.config:triton.enable_pdl": "2.11, 2.13",
    },
    "megatron-core": {
        "megatron.core.tensor_parallel.random:_CUDA_RNG_STATE_TRACKER": "0.16.1, 0.19.2",
        "megatron.core.tensor_parallel.random:_CUDA_RNG_STATE_TRACKER_INITIALIZED": "0.16.1, 0.19.2",
        "megatron.core.tensor_parallel.random:_DATA_PARALLEL_RNG_TRACKER_NAME": "0.16.1, 0.19.2",
        "megatron.core.tensor_parallel.random:_MODEL_PARALLEL_RNG_TRACKER_NAME": "0.16.1, 0.19.2",
        "megatron.core.parallel_state:_global_process_group_list": "0.16.1, 0.19.2",
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_results_queue": "0.16.1, 0.19.2",
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data": (
            "0.16.1, 0.19.2"
        ),
        "megatron.core.optimizer:Adam": "0.16.1, 0.19.2",
        "megatron.core.optimizer:USING_PYTORCH_OPTIMIZER": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:Adam": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:USING_TE_OPTIMIZER": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map": "0.16.1, 0.19.2",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_main_param_and_optimizer_states": (
            "0.16.1, 0.19.2"
        ),
        "megatron.core.models.gpt:GPTModel._preprocess": "0.16.1, 0.19.2",
        "megatron.core.models.gpt:GPTModel._postprocess": "0.16.1, 0.19.2",
    },
}
"""Of each library the names that are used and not promised, as module:attribute, and the versions they were seen in."""


def mlp_spec(products: Any) -> Any:
    """The spec of an MLP with these ``MLPSubmodules``; 0.19 wants what calls a class method in its place."""
    from megatron.core.transformer import ModuleSpec
    from megatron.core.transformer.mlp import MLP

    build = getattr(MLP, "as_mlp_submodule", None)
    return partial(build, submodules=products) if build else ModuleSpec(module=MLP, submodules=products)


def gradients_of_norm(optimizer: Any) -> list[Tensor]:
    """The main gradients of this rank that no other rank counts; 0.19 calls them by another name."""
    named = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    found: list[Tensor] = named()
    return found


def own_writer() -> dict[str, str]:
    """What tells ``dist_checkpointing.save`` to write with megatron-core's writer; 0.19 else wants NVIDIA's package."""
    from megatron.core.dist_checkpointing import save

    return {"async_strategy": "mcore"} if "async_strategy" in signature(save).parameters else {}


def quieten() -> None:
    """Drop what newer versions warn of once for each model, and nothing else of them."""
    for name, beginning in _UNHEARD.items():
        logging.getLogger(name).addFilter(_Without(beginning))


class _Without(logging.Filter):
    def __init__(self, beginning: str) -> None:
        super().__init__()
        self._beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self._beginning)

    def __eq__(self, other: object) -> bool:
        """So that a second call adds nothing."""
        return isinstance(other, _Without) and other._beginning == self._beginning

    def __hash__(self) -> int:
        return hash(self._beginning)

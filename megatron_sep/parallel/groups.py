"""Process groups from the environment that torchrun, SLURM or deepspeed sets."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_sep.config.schema import ParallelConfig
from megatron_sep.parallel import cpu

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_NOISE = (  # of megatron-core, about what it finds missing or calls by an old name; nothing a user can mend
    ".*Transformer Engine",
    "Apex is not installed",
    ".*deprecating ShardedTensor",
    "`load_state_dict` is deprecated",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".*is deprecated. Please use `torch.distributed",
)


class ParallelError(ValueError):
    """A parallel layout that does not fit the processes that were started."""


@contextmanager
def process_groups(config: ParallelConfig, seed: int) -> Iterator[None]:
    """Join the job, build megatron-core's groups and seed every random state; leave on exit.

    Without torchrun or SLURM it is a job of one process. gloo on CPU, nccl on GPU. Raises ParallelError.
    """
    join_job(config.timeout_minutes)
    try:
        set_layout(config, seed)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def join_job(timeout_minutes: int) -> None:
    """Initialise torch.distributed from the environment and pick this process's GPU."""
    for name, slurm in _SLURM.items():
        if name not in os.environ and slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    for about in _NOISE:
        warnings.filterwarnings("ignore", message=about)
    cpu.install()
    timeout = timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=HashStore(), rank=0, world_size=1)


def set_layout(config: ParallelConfig, seed: int) -> None:
    """(Re)build megatron-core's process groups for a layout and seed every random state."""
    from megatron.core import parallel_state

    world = dist.get_world_size()
    model_parallel = config.tensor * config.pipeline
    if world % model_parallel:
        raise ParallelError(
            f"parallel.tensor={config.tensor} x parallel.pipeline={config.pipeline} does not divide the {world} "
            f"process(es) of this job; start a multiple of {model_parallel} or lower parallel.tensor or pipeline"
        )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    seed_everything(seed)


def seed_everything(seed: int) -> None:
    """Seed dropout: different on every data-parallel rank and pipeline stage, and as tensor parallelism needs it."""
    from megatron.core import parallel_state, tensor_parallel

    stage = parallel_state.get_pipeline_model_parallel_rank()
    seed += 100 * stage + 10_000 * parallel_state.get_data_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def current_device() -> torch.device:
    """This process's GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

"""Process groups from the environment that torchrun, SLURM or deepspeed sets."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_sep.config.layout import job_mistakes
from megatron_sep.config.schema import ParallelConfig
from megatron_sep.errors import UserError
from megatron_sep.parallel import core_versions, cpu
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.flags import Flags
from megatron_sep.parallel.seeds import seed_dropout
from megatron_sep.parallel.store import store_of
from megatron_sep.parallel.topology import Axis, Topology
from megatron_sep.parallel.watch import Watch

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
_NOISE = (  # of megatron-core and torch, about what they find missing or call by an old name; nothing a user can mend
    ".*Transformer Engine",
    "Apex is not installed",
    ".*deprecating ShardedTensor",
    "`load_state_dict` is deprecated",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    ".*is deprecated. Please use `torch.distributed",
    r"barrier\(\): using the device under current context",  # it is the one that was set
)


class ParallelError(UserError):
    """A parallel layout that does not fit the processes that were started."""


@contextmanager
def process_groups(config: ParallelConfig, seed: int = 0, job: str = "") -> Iterator[Topology]:
    """Join the job and build megatron-core's groups: this process's place in it; leave on exit.

    Without torchrun or SLURM it is a job of one process. gloo on CPU, nccl on GPU. ``job`` is as in ``join_job``.
    Raises ParallelError, and PeerError where another process of the job is lost, whatever this one was doing.
    """
    watch = join_job(config.timeout_minutes, job)
    ended: BaseException | None = None
    try:
        yield set_layout(config, seed)
    except BaseException as error:
        ended = watch.named(error) or error
        raise ended from (None if ended is error else error)
    finally:
        _let_go()
        if dist.is_initialized():
            dist.destroy_process_group()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.set_stream(torch.cuda.default_stream())
        watch.leave(ended)


def join_job(timeout_minutes: float, job: str = "") -> Watch:
    """Initialise torch.distributed from the environment, pick this process's GPU and begin to watch the others.

    ``job``: what tells it from others that might meet at the same port, the same on all of its processes.
    """
    for name, slurm in _SLURM.items():
        if name not in os.environ and slurm in os.environ:
            os.environ[name] = os.environ[slurm]
    for about in _NOISE:
        warnings.filterwarnings("ignore", message=about)
    core_versions.quieten()
    cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # what the legacy stream began cannot be recorded as a CUDA graph
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    rank, ranks = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else (0, 1)
    store = HashStore() if ranks == 1 else store_of(os.environ, rank, ranks, timeout, job)
    watch = Watch(rank, ranks, timeout)
    try:
        if ranks > 1:
            watch.join(store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)
    except Exception as error:
        raise watch.named(error) or error from None
    _watches[:] = [watch]
    return watch


_watches: list[Watch] = []
"""Of the job that this process has joined."""


def set_layout(config: ParallelConfig, seed: int = 0) -> Topology:
    """(Re)build megatron-core's process groups for a layout, and seed every random state. Raises ParallelError."""
    from megatron.core import parallel_state

    mistakes = job_mistakes(config, None, dist.get_world_size())
    if mistakes:
        raise ParallelError("; ".join(mistakes))
    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        distributed_timeout_minutes=config.timeout_minutes,
    )
    found = topology()
    seed_dropout(found, seed, step=0)
    return found


def before_groups_go(let_go: Callable[[], None]) -> None:
    """What has recorded messages in a CUDA graph is told to drop it in time: a group waits for its graphs for ever.

    ``let_go`` is a method of an object, which this does not keep alive.
    """
    _recorded.append(WeakMethod(let_go))


_recorded: list[WeakMethod[Callable[[], None]]] = []


def _let_go() -> None:
    while _recorded:
        let_go = _recorded.pop()()
        if let_go is not None:
            let_go()


def _leave_groups() -> None:
    """Those of the layout before, if there was one: megatron-core forgets them, and their threads would stay."""
    from megatron.core import parallel_state

    _let_go()
    for group in parallel_state._global_process_group_list or ():
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def topology() -> Topology:
    """This process's place under the layout that was set last: the only place that asks megatron-core's globals."""
    from megatron.core import parallel_state as groups

    return Topology(
        process=Axis(dist.get_rank(), dist.get_world_size()),
        data=Axis(groups.get_data_parallel_rank(), groups.get_data_parallel_world_size()),
        tensor=Axis(groups.get_tensor_model_parallel_rank(), groups.get_tensor_model_parallel_world_size()),
        pipeline=Axis(groups.get_pipeline_model_parallel_rank(), groups.get_pipeline_model_parallel_world_size()),
        context=Axis(groups.get_context_parallel_rank(), groups.get_context_parallel_world_size()),
        device=current_device(),
        chunks=groups.get_virtual_pipeline_model_parallel_world_size() or 1,
        data_group=groups.get_data_parallel_group(),
        tensor_group=groups.get_tensor_model_parallel_group(),
        flags=Flags(current_device(), dist.get_world_size()),
        watch=_watches[0],
        context_group=groups.get_context_parallel_group(),
        token_group=groups.get_data_parallel_group(with_context_parallel=True),
    )

"""The store where the processes of a job meet: torchrun keeps it, or the job's first process."""

from collections.abc import Mapping
from concurrent.futures import TimeoutError as OutOfTimeError
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from megatron_sep.parallel.background import in_background
from megatron_sep.parallel.watch import PeerError

_MARGIN = 2.0
"""Seconds past the time-out in which torch gives up by itself, where it does."""
_JOB = "watch/job"


def store_of(environment: Mapping[str, str], rank: int, ranks: int, timeout: timedelta, job: str = "") -> Store:
    """The job's store, at MASTER_ADDR and MASTER_PORT. Every process of a job names the same ``job``.

    Raises PeerError where it is not there within ``timeout``, where something else answers, and where it is another
    job's.
    """
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), int(environment.get("MASTER_PORT", "29500"))
    launcher = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps, place = rank == 0 and not launcher, f"{address}:{port}"

    def meet() -> Store:
        found: Store = TCPStore(
            address, port, ranks, is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
        return found

    try:
        # torch waits for ever for the first answer of whatever else listens there
        store = in_background(meet, "store").result(timeout.total_seconds() + _MARGIN)
    except (dist.DistError, OutOfTimeError) as error:
        why = (str(error).strip() or "something that is no store").splitlines()[0]
        raise PeerError(
            f"rank 0 of {ranks} cannot keep the job's store at {place} ({why}); set a MASTER_PORT that is free"
            if keeps
            else f"rank {rank} of {ranks}: no answer from {place}, where {'the launcher' if launcher else 'rank 0'} "
            f"keeps the job's store ({why}); see that it runs, and that MASTER_ADDR and MASTER_PORT are right"
        ) from error
    own = PrefixStore(f"attempt_{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    _check_job(own, f"{ranks} processes{job and f' on {job}'}", f"rank {rank}", place)
    return own


def _check_job(store: Store, job: str, who: str, place: str) -> None:
    """The first process to come says whose store it is. Raises PeerError for a process of another job."""
    there = store.compare_set(_JOB, "", job).decode()
    if there != job:
        raise PeerError(
            f"{who} of {job}: at {place} meets another job, {there}; set another MASTER_PORT for one of them"
        )

"""One process of a job that adds up numbers for ever, under watch.

python tests/parallel/lost_peer.py MINUTES [fail] [nccl]    with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set

Prints "ready" and waits for a line; then joins the job, and prints "working" at the first sum. `fail`: raises an error
then. `nccl`: on a GPU each. Ends as the command line does: a message and its code.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sep.errors import SepError
from megatron_sep.parallel.store import store_of
from megatron_sep.parallel.watch import Watch


def main() -> None:
    rank, ranks, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timedelta(minutes=float(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()  # what follows has a time limit, and imports take their time
    watch = Watch(rank, ranks, timeout)
    try:
        store = store_of(os.environ, rank, ranks, timeout)
        watch.join(store)
        if "nccl" in sys.argv:
            torch.cuda.set_device(rank)
        backend = "nccl" if "nccl" in sys.argv else "gloo"
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=ranks)
        work(watch)
    except Exception as error:
        found = watch.named(error) or error
        watch.leave(found)
        print(f"error: {found}", file=sys.stderr, flush=True)
        os._exit(getattr(found, "exit_code", 9) if isinstance(found, SepError) else 9)


def work(watch: Watch) -> None:
    watch.at("in step 7")
    total = torch.zeros(1, device="cuda" if "nccl" in sys.argv else "cpu")
    dist.all_reduce(total)
    total.item()
    print("working", flush=True)
    while True:
        if "fail" in sys.argv:
            raise ValueError("a number that cannot be")
        dist.all_reduce(total)
        total.item()  # waits for the device, as a step does


if __name__ == "__main__":
    main()

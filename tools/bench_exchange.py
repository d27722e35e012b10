"""Time what context parallelism sends on two GPUs or more: the landmarks and windows, beside an all-gather of all keys.

    torchrun --nproc-per-node 2 tools/bench_exchange.py [--shapes 1,8,8,65536,128,256 ...] [--json FILE]

A shape is B,H,KV,S,D,window of the whole sequence; 15 % of the tokens are separators, 4 are sinks. Each rank sends its
keys and values in bf16 and gets the gradients back. "exchange" is `parallel/exchange.py`; "all-gather" is NCCL's
all-gather of keys and values and the reduce-scatter of their gradients, which is what megatron-core's context
parallelism of that name moves. Medians in ms of the slowest rank, MiB of the rank that is sent most.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from bench_attention import Shape, drawn_ids
from torch import Tensor
from trials import write

from megatron_sep.attention.context import context_plans
from megatron_sep.parallel.exchange import gather_keys
from megatron_sep.parallel.groups import join_job
from megatron_sep.parallel.share import Share

SHAPES = ["1,8,8,65536,128,256", "1,8,8,131072,128,256", "1,12,12,65536,64,64", "1,12,12,131072,64,64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,H,KV,S,D,window")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    watch = join_job(timeout_minutes=2)
    rows = [bench(Shape.parse(shape)) for shape in options.shapes]
    if dist.get_rank() == 0:
        print(f"{torch.cuda.get_device_name()}, {dist.get_world_size()} ranks, {dist.get_backend()}")
        for row in rows:
            print(", ".join(f"{key} {value}" for key, value in row.items()))
        write(options.json, rows)
    dist.destroy_process_group()
    watch.leave(None)


def bench(shape: Shape) -> dict[str, str | float]:
    """Forward, and forward with the gradients' way back, of both."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pattern, ids = drawn_ids(shape)
    share = Share(rank, ranks, shape.length)
    (plan,) = context_plans([pattern.plan(ids.cpu())], share, torch.device("cuda"))
    own = (shape.length // ranks, shape.batch, shape.kv_heads, shape.size)
    k, v = (torch.randn(own, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))

    def exchange() -> tuple[Tensor, Tensor]:
        return gather_keys(k, v, plan.route, None)

    def all_gather() -> None:
        for tensor in (k, v):
            dist.all_gather_into_tensor(tensor.new_empty(own[0] * ranks, *own[1:]), tensor.detach())

    gradients = [torch.randn_like(x) for x in exchange()]
    whole = torch.randn(own[0] * ranks, *own[1:], device="cuda", dtype=torch.bfloat16)

    def exchange_both() -> None:
        torch.autograd.grad(exchange(), (k, v), gradients)

    def all_gather_both() -> None:
        all_gather()
        for _ in (k, v):
            dist.reduce_scatter_tensor(whole.new_empty(own), whole)

    received = sum(plan.route.num_received) * 2 * shape.kv_heads * shape.size * 2
    return {
        "shape": ",".join(map(str, shape)),
        "exchange": slowest(exchange),
        "exchange, both": slowest(exchange_both),
        "all-gather": slowest(all_gather),
        "all-gather, both": slowest(all_gather_both),
        "MiB": most(received / 2**20),
        "MiB all-gather": 4 * shape.batch * (shape.length - own[0]) * shape.kv_heads * shape.size / 2**20,
    }


def slowest(run: Callable[[], object], times: int = 30) -> float:
    """Median ms of a call, of the rank that takes longest."""
    found = []
    for _ in range(times + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        dist.barrier()
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return round(most(statistics.median(found[5:])), 3)


def most(value: float) -> float:
    """Of all ranks."""
    tensor = torch.tensor([value], device="cuda", dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return round(float(tensor), 3)


if __name__ == "__main__":
    main()

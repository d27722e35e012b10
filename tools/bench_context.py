"""Time the attention of each context-parallel rank on one GPU, against the whole sequence's divided by the ranks.

    python tools/bench_context.py [--shapes 1,8,8,65536,128,256 ...] [--ranks 2 4 8] [--json FILE]

A shape is B,H,KV,S,D,window; 15 % of the tokens are separators, 4 are sinks. A rank's time is that of its two chunks
of queries over the keys that it would hold and be sent, forward and forward + backward, medians of CUDA graph replays
in ms; the exchange itself is not in it. "slowest" is the slowest rank's, "even" the whole sequence's divided by the
ranks. Keys are those in the slots of the slowest rank; MiB are keys and values that the rank that is sent most receives
of a layer in bf16, beside what all-gather would bring it.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_attention import Shape, drawn_ids, environment, forward_backward, inputs, milliseconds
from torch import Tensor

from megatron_sep.attention.context import ContextPlan, context_plans
from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.index import indexed
from megatron_sep.parallel.share import Share

SHAPES = [Shape(1, 8, 8, 65536, 128, 256), Shape(1, 8, 8, 131072, 128, 256), Shape(1, 32, 8, 65536, 128, 256)]
COLUMNS = "B,H/KV,S,D,n; ranks; whole fwd / f+b; even; slowest; even / slowest; keys; MiB; MiB all-gather"


def attend(plan: ContextPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A rank's two chunks of queries over the keys in its slots."""
    chunks = zip(q.chunk(len(plan.parts), 2), plan.parts, strict=True)
    return torch.cat([sep_attention(x, k[:, :, : p.num_keys], v[:, :, : p.num_keys], p) for x, p in chunks], 2)


def both(attention: Any, tensors: list[Tensor]) -> tuple[float, float]:
    """(forward, forward + backward) in ms."""
    with torch.no_grad():
        forward = milliseconds(lambda: attention(*tensors[:3]))
    return forward, milliseconds(partial(forward_backward, attention, tensors))


def rank_times(shape: Shape, plan: MaskPlan, ranks: int) -> list[dict[str, Any]]:
    """Of each rank: its times, the slots of its keys, and the bytes that it is sent."""
    found = []
    for rank in range(ranks):
        (split,) = context_plans([plan], Share(rank, ranks, shape.length), torch.device("cuda"))
        mine = indexed(split)
        queries = inputs(shape._replace(length=shape.length // ranks), "sbhd", rank)
        keys = inputs(shape._replace(length=mine.route.num_slots), "sbhd", rank)
        tensors = [queries[0], keys[1], keys[2], queries[3]]
        forward, step = both(partial(attend, mine), tensors)
        received = sum(mine.route.num_received) * 2 * shape.kv_heads * shape.size * 2
        found.append({"forward": forward, "both": step, "keys": mine.route.num_slots, "bytes": received})
    return found


def bench(shape: Shape, ranks: int, whole: tuple[float, float], plan: MaskPlan) -> dict[str, Any]:
    """The figures of a row."""
    each = rank_times(shape, plan, ranks)
    gathered = 4 * shape.batch * shape.length * shape.kv_heads * shape.size * (ranks - 1) // ranks
    return {"shape": shape, "ranks": ranks, "whole": whole, "each": each, "gathered": gathered}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    x, ranks = row["shape"], row["ranks"]
    slowest = [max(each[key] for each in row["each"]) for key in ("forward", "both")]
    even = [time / ranks for time in row["whole"]]
    pairs = (row["whole"], even, slowest, [e / s for e, s in zip(even, slowest, strict=True)])
    cells = [f"{x.batch},{x.heads}/{x.kv_heads},{x.length},{x.size},{x.window}", str(ranks)]
    cells += [f"{forward:.3f} / {step:.3f}" for forward, step in pairs]
    cells.append(str(max(row["each"], key=lambda each: each["both"])["keys"]))
    cells += [f"{size / 2**20:.1f}" for size in (max(each["bytes"] for each in row["each"]), row["gathered"])]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="B,H,KV,S,D,window")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_context: no CUDA device here; these figures come from a GPU or not at all")
    print(", ".join(f"{key} {value}" for key, value in environment().items()), flush=True)
    print(f"| {COLUMNS.replace(';', ' |')} |\n|{'---|' * len(COLUMNS.split(';'))}", flush=True)
    rows = []
    for shape in options.shapes:
        pattern, ids = drawn_ids(shape)
        plan = indexed(pattern.plan(ids))
        whole = both(lambda q, k, v, plan=plan: sep_attention(q, k, v, plan), inputs(shape, "sbhd"))
        on_host = pattern.plan(ids.cpu())
        for ranks in options.ranks:
            rows.append(bench(shape, ranks, whole, on_host))
            print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "rows": rows}))
    print("after:", environment()["clocks"])


if __name__ == "__main__":
    main()

"""Find the tile settings of the fused Sep-Attention kernel on this GPU and print them as the table in tiles.py.

    python tools/tune_attention.py [--json FILE]

Each kernel is timed alone at one shape of each class. Candidates are compiled first by a pool of processes, which fill
Triton's cache; the timed process then loads them. One that does not fit the chip, or spills, is dropped.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_attention import Shape, drawn_ids, inputs, milliseconds

from megatron_sep.kernels.sep_attention import triton as fused
from megatron_sep.kernels.sep_attention.index import indexed
from megatron_sep.kernels.sep_attention.tiles import LENGTHS, WINDOWS, Tile, class_of

SHAPES = [
    Shape(32, 12, 12, 2048, 64, 64),
    Shape(2, 12, 12, 16384, 64, 64),
    Shape(16, 16, 16, 2048, 128, 64),
    Shape(4, 16, 16, 8192, 128, 256),
    Shape(4, 32, 8, 8192, 128, 256),
    Shape(1, 16, 16, 32768, 128, 256),
    Shape(8, 8, 8, 2048, 256, 64),
]
KERNELS = ("forward", "query_gradient", "key_gradient")
REGISTERS = {4: (96, 128, 168, None), 8: (128, None)}
"""Caps worth trying by warps: where one more block fits on a multiprocessor of 65,536 registers."""


class Job(NamedTuple):
    """One candidate."""

    shape: Shape
    kernel: str
    tile: Tile


def candidates(shape: Shape, kernel: str) -> Iterator[Tile]:
    """Settings worth timing: blocks of 64 accumulator rows for each group of 4 warps."""
    small = shape.size <= 64
    if kernel == "key_gradient":
        blocks = [(32, 64, 4), (64, 64, 4), (64, 128, 8)] + ([(32, 128, 8)] if small else [(16, 64, 4)])
    else:
        blocks = [(64, 32, 4), (64, 64, 4), (128, 64, 8)] + ([(64, 128, 4)] if small else [(128, 128, 8)])
    for (queries, keys, warps), stages in product(blocks, (2, 3) if small else (2, 3, 4)):
        for registers in REGISTERS[warps]:
            if registers is None or shape.size + 14 < registers <= 2 * shape.size + 40:
                yield Tile(queries, keys, warps, stages, registers)
        if small and warps == 4 and max(queries, keys) == 64 and stages > 2:
            yield Tile(queries, keys, warps, stages, None, descriptors=False)


class Problem:
    """Tensors of one shape, and a way to launch each kernel on them."""

    def __init__(self, shape: Shape) -> None:
        self.q, self.k, self.v, self.do = (x.detach() for x in inputs(shape))
        pattern, ids = drawn_ids(shape)
        self.plan = indexed(pattern.plan(ids))
        index = self.plan.index
        assert index is not None
        self.scale = shape.size**-0.5
        self.o, self.lse, self.kc, self.vc = fused.sep_attention_forward(
            self.q, self.k, self.v, self.plan.reach_BT, index.seen_BT, index.sorted_2BG, None,
            0, shape.window, shape.length, self.scale,
        )  # fmt: skip
        self.dq, self.dk, self.dv = map(torch.empty_like, (self.q, self.k, self.v))
        self.delta = torch.zeros_like(self.lse)

    def launch(self, kernel: str, tile: Tile) -> None:
        """Run one kernel with one setting."""
        index, plan = self.plan.index, self.plan
        assert index is not None
        common = (self.q, self.k, self.v)
        order = index.sorted_2BG
        keys = (self.kc, self.vc, plan.reach_BT, index.seen_BT, order)
        sizes = (0, plan.window, self.q.shape[2])
        if kernel == "forward":
            fused.run_forward(*common, *keys, None, *sizes, self.scale, self.o, self.lse, tile)
        elif kernel == "query_gradient":
            fused.run_query_gradient(
                *common, *keys, None, *sizes, self.scale, self.o, self.do, self.lse, self.delta, self.dq, tile,
            )  # fmt: skip
        else:
            fused.run_key_gradient(
                *common, order, 0, self.scale, self.do, self.lse, self.delta, self.dk, self.dv, tile,
            )  # fmt: skip


def compile_jobs(jobs: list[Job]) -> list[str | None]:
    """Launch each candidate once on a small problem of its kind; the error of one that does not fit."""
    problems: dict[Any, Problem] = {}
    return [_compile(job, problems) for job in jobs]


def _compile(job: Job, problems: dict[Any, Problem]) -> str | None:
    group = job.shape.heads // job.shape.kv_heads
    small = Shape(1, group, 1, 1024, job.shape.size, job.shape.window)
    try:
        if small not in problems:
            problems[small] = Problem(small)
        problems[small].launch(job.kernel, job.tile)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


def fitting(jobs: list[Job], processes: int) -> list[Job]:
    """Compile all candidates in parallel; those that fit."""
    chunks = [jobs[i::processes] for i in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(compile_jobs, chunks))
    failed = {
        job: error
        for chunk, errors in zip(chunks, results, strict=True)
        for job, error in zip(chunk, errors, strict=True)
    }
    return [job for job in jobs if failed[job] is None]


def time_jobs(jobs: list[Job]) -> dict[Job, float]:
    """Milliseconds of each candidate; the first eight of each kernel and shape are printed."""
    times: dict[Job, float] = {}
    for shape in dict.fromkeys(job.shape for job in jobs):
        problem = Problem(shape)
        for job in jobs:
            if job.shape == shape:
                times[job] = milliseconds(partial(problem.launch, job.kernel, job.tile), least=15.0)
        for kernel in KERNELS:
            ranked = sorted((t, job.tile) for job, t in times.items() if (job.shape, job.kernel) == (shape, kernel))
            print(shape, kernel, *(f"\n    {t:.4f} {tuple(tile)}" for t, tile in ranked[:8]), flush=True)
    return times


def table(times: dict[Job, float]) -> str:
    """The fastest settings of each class, as source; of two shapes in one class the first decides."""
    gpu = torch.cuda.get_device_name()
    lines: dict[tuple[str, int, str, str], str] = {}
    for shape in dict.fromkeys(job.shape for job in times):
        key = (gpu, fused._padded(shape.size), class_of(shape.length, LENGTHS), class_of(shape.window, WINDOWS))
        best = [
            min((t, job.tile) for job, t in times.items() if (job.shape, job.kernel) == (shape, kernel))[1]
            for kernel in KERNELS
        ]
        body = ", ".join(map(str, best))
        lines.setdefault(key, f"    {key!r}: Tiles({body}),")
    return "TABLE: dict[tuple[str, int, str, str], Tiles] = {\n" + "\n".join(lines.values()) + "\n}"


def main() -> None:
    """Compile, time, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time here")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_attention: no CUDA device here")
    jobs = [Job(shape, kernel, tile) for shape in SHAPES for kernel in KERNELS for tile in candidates(shape, kernel)]
    kept = fitting(jobs, options.processes)
    print(f"{len(jobs)} candidates, {len(kept)} fit", flush=True)
    times = time_jobs(kept)
    print(table(times))
    if options.json:
        options.json.write_text(json.dumps([[*job.shape, job.kernel, *job.tile, t] for job, t in times.items()]))


if __name__ == "__main__":
    main()

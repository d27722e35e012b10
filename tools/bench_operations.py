"""Time every row of an operation that is no attention on this machine: layernorm, rmsnorm, cross_entropy or adamw.

    python tools/bench_operations.py layernorm --tokens 32768 --size 768
    python tools/bench_operations.py cross_entropy --tokens 8192 --size 50304
    python tools/bench_operations.py adamw --size 10000000 --tokens 16

Times are medians in ms of calls that are waited for. Norms and losses: forward and backward over ``tokens`` rows of
``size`` values, as they are and compiled as a decoder compiles them. adamw: one step over ``tokens`` parameters of
``size`` values, never compiled. A row that cannot run here says why not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_sep.config.schema import ParallelConfig
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.call import Call
from megatron_sep.model.build import DTYPES
from megatron_sep.model.operations import operations_table
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.groups import process_groups

Run = Callable[[], object]


def main() -> None:
    options = parse()
    with process_groups(ParallelConfig(), seed=1):
        device, operation = current_device(), operations_table()[options.operation]
        call = Call.on(device, DTYPES[options.precision], training=True)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, {options}\n{'row':>20} {'eager':>10} {'compiled':>10}")
        for row in operation.implementations:
            reason = row.why_not(call)
            if reason is None:
                print(f"{row.name:>20} {times(row.load(), options, call.dtype)}", flush=True)
            else:
                print(f"{row.name:>20} {reason}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=list(RUNS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args()


def times(found: Any, options: argparse.Namespace, dtype: torch.dtype) -> str:
    """Of one row, eager and, where a decoder would, compiled."""
    make = RUNS[options.operation]
    runs = [make(found, options.tokens, options.size, dtype, compiled) for compiled in (False, True)]
    return " ".join(f"{milliseconds(run, options.repeats):>10.3f}" if run else f"{'-':>10}" for run in runs)


def norm(make: Any, tokens: int, size: int, dtype: torch.dtype, compiled: bool) -> Run:
    module = make(size, 1e-5, dtype).to(current_device())
    x = torch.randn(tokens, size, device=current_device(), dtype=dtype, requires_grad=True)
    inputs = (x, *module.parameters())
    apply = torch.compile(module, dynamic=False) if compiled else module
    return lambda: torch.autograd.grad(apply(x), inputs, x.detach())


def cross_entropy(losses: Any, tokens: int, size: int, dtype: torch.dtype, compiled: bool) -> Run:
    logits = torch.randn(tokens, 1, size, device=current_device(), dtype=dtype, requires_grad=True)
    labels = torch.randint(0, size, (1, tokens), device=current_device())
    apply = torch.compile(losses, dynamic=False) if compiled else losses

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(apply(labels, logits * 1).mean(), logits)  # megatron-core's overwrites its logits

    return run


def adamw(found: AdamW, tokens: int, size: int, _dtype: torch.dtype, compiled: bool) -> Run | None:
    if compiled:
        return None
    parameters = [torch.randn(size, device=current_device(), requires_grad=True) for _ in range(tokens)]
    kind: Any = found.kind  # the base class of optimizers takes no lr, each of the rows does
    optimizer = kind(parameters, lr=1e-4)
    for group in optimizer.param_groups:
        group.update(found.settings)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return optimizer.step


RUNS: dict[str, Callable[[Any, int, int, torch.dtype, bool], Run | None]] = {
    "layernorm": norm,
    "rmsnorm": norm,
    "cross_entropy": cross_entropy,
    "adamw": adamw,
}


def milliseconds(run: Run, repeats: int) -> float:
    """The median of calls that are waited for, after three that warm up."""
    seconds = []
    for repeat in range(-3, repeats):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


if __name__ == "__main__":
    main()

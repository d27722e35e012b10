"""Time every row of the operations beside attention against the memory's floor and against torch.compile.

    python tools/bench_operations.py --json out.json          # all operations at the shapes of docs/performance.md
    python tools/bench_operations.py layernorm bias_gelu --shape 160m 1.4b
    python tools/bench_operations.py adamw

Times are medians in ms of one forward pass, and of forward and backward, replayed as CUDA graphs where there is a GPU.
The floor is the bytes that must be read and written, at the rate of an addition of 1 to 1 GiB on this machine in this
run. "compiled" is a row under torch.compile, as a decoder's layer is; the last column is the reference's time, or
torch's where there is such a row, compiled, over this one's. adamw: a step over 16 parameters of 10 million values,
eager. A row that cannot run here says why not.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_sep.config.schema import ParallelConfig
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import Implementation
from megatron_sep.model.build import DTYPES
from megatron_sep.model.operations import operations_table
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.groups import process_groups

Run = Callable[[], object]
Compute = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """What a layer of a model of some size computes at once."""

    tokens: int
    hidden: int
    heads: int
    groups: int
    mlp: int
    vocab: int
    rotary: float
    norms: tuple[str, ...]

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.groups) * self.head_size


SHAPES = {
    "160m": Shape(32768, 768, 12, 12, 3072, 50304, 0.25, ("layernorm",)),
    "1.4b": Shape(16384, 2048, 16, 16, 8192, 50304, 0.25, ("layernorm",)),
    "llama": Shape(8192, 4096, 32, 8, 14336, 128256, 1.0, ("rmsnorm",)),
}


@dataclass(frozen=True)
class Case:
    """An operation at a shape: one pass, its inputs, and how many numbers must be read and written."""

    apply: Compute
    inputs: tuple[Tensor, ...]
    forward: int
    backward: int


@dataclass(frozen=True)
class Timing:
    """A line of the table; ms, bytes a second, ratios."""

    operation: str
    shape: str
    row: str
    compiled: bool
    forward_ms: float
    both_ms: float
    floor_ms: float
    gb_per_s: float
    over_floor: float


def main() -> None:
    options = parse()
    dtype = DTYPES[options.precision]
    with process_groups(ParallelConfig(), seed=1):
        device = current_device()
        rate = bytes_per_ms(options.repeats) if device.type == "cuda" else float("nan")
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        header = f"{name}, torch {torch.__version__}, {options.precision}, {rate / 1e6:.0f} GB/s"
        print(header)
        if "adamw" in options.operation:
            print_adamw(dtype, options.repeats)
        timings = list(walk(options, dtype, rate))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": header, "rows": [asdict(timing) for timing in timings]}, indent=1)
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", nargs="*", default=list(CASES))
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, help="instead of the shape's")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    unknown = set(options.operation) - {*CASES, "adamw"}
    if unknown:
        parser.error(f"no operation {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}, adamw")
    return options


def walk(options: argparse.Namespace, dtype: torch.dtype, rate: float) -> Iterator[Timing]:
    """Every row of every operation at every shape, printed as it is timed."""
    print(
        f"{'operation':>14} {'shape':>5} {'row':>20} "
        f"{'forward':>8} {'both':>8} {'GB/s':>6} {'/floor':>7} {'compile/':>9}"
    )
    for name in options.shape:
        given = SHAPES[name]
        shape = Shape(**asdict(given) | {"tokens": options.tokens or given.tokens})
        for operation in options.operation:
            if operation in CASES and operation not in {"layernorm", "rmsnorm"} - set(shape.norms):
                yield from rows_of(operation, name, shape, dtype, rate, options.repeats)


def rows_of(operation: str, name: str, shape: Shape, dtype: torch.dtype, rate: float, repeats: int) -> Iterator[Timing]:
    """Each row as it is and compiled; the kernels last, so that what they are held against is known."""
    call = Call.on(current_device(), dtype, training=True, head_size=shape.head_size)
    compiled_ms = float("nan")
    for row in reversed(operations_table()[operation].implementations):
        reason = row.why_not(call)
        if reason is not None:
            print(f"{operation:>14} {name:>5} {row.name:>20} {reason}")
            continue
        for compiled in (False, True):
            timing = timed(row, compiled, (operation, name, shape, dtype), rate, repeats)
            if compiled and row.name in ("reference", "torch"):
                compiled_ms = timing.both_ms
            label = row.name + (" compiled" if compiled else "")
            print(
                f"{operation:>14} {name:>5} {label:>20} {timing.forward_ms:8.3f} {timing.both_ms:8.3f} "
                f"{timing.gb_per_s:6.0f} {timing.over_floor:7.2f} {compiled_ms / timing.both_ms:9.2f}",
                flush=True,
            )
            yield timing


def timed(
    row: Implementation, compiled: bool, what: tuple[str, str, Shape, torch.dtype], rate: float, repeats: int
) -> Timing:
    operation, name, shape, dtype = what
    torch.compiler.reset()
    case = CASES[operation](row, shape, dtype)
    apply = torch.compile(case.apply, dynamic=False) if compiled else case.apply
    forward_ms = milliseconds(lambda: apply(*case.inputs), repeats)
    both_ms = milliseconds(both(apply, case.inputs), repeats)
    moved = (case.forward + case.backward) * dtype.itemsize
    floor = moved / rate
    return Timing(
        operation, name, row.name, compiled, forward_ms, both_ms, floor, moved / both_ms / 1e6, both_ms / floor
    )


def both(apply: Compute, inputs: tuple[Tensor, ...]) -> Run:
    """Forward, and backward from gradients that are made once."""
    outputs = apply(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(x) for x in outputs]
    wanted = [x for x in inputs if x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        found = apply(*inputs)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), wanted, gradients)

    return run


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=current_device(), dtype=dtype, requires_grad=True)


def norm(row: Implementation, shape: Shape, dtype: torch.dtype) -> Case:
    module = row.load()(shape.hidden, 1e-5, dtype).to(current_device())
    x = random(shape.tokens, shape.hidden, dtype=dtype)

    def apply(x: Tensor, *_parameters: Tensor) -> Tensor:
        found: Tensor = module(x)
        return found

    return Case(apply, (x, *module.parameters()), 2 * x.numel(), 3 * x.numel())


def open_residual(row: Implementation, shape: Shape, dtype: torch.dtype) -> Case:
    """The two norms of a parallel residual, and the gradient of the stream."""
    make = operations_table()[shape.norms[0]].resolve(Call("cpu", dtype), "torch")
    norms = [make(shape.hidden, 1e-5, dtype).to(current_device()) for _ in range(2)]
    x = random(shape.tokens, shape.hidden, dtype=dtype)
    biases = [random(shape.hidden, dtype=dtype) for _ in range(2)] if shape.norms[0] == "layernorm" else []
    compute, parameters = row.load(), [parameter for each in norms for parameter in each.parameters()]

    def apply(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        outputs, stream = compute(x, norms, rest[: len(biases)])
        return *outputs, stream

    stream = x.numel() if biases else 0  # with its biases it is written
    return Case(apply, (x, *biases, *parameters), 3 * x.numel() + stream, 5 * x.numel())


def split_rotated(row: Implementation, shape: Shape, dtype: torch.dtype) -> Case:
    length = min(shape.tokens, 2048)
    qkv = random(length, shape.tokens // length, shape.qkv, dtype=dtype)
    half = int(shape.head_size * shape.rotary) // 2
    angle = torch.outer(torch.arange(length), 10000 ** -torch.linspace(0, 1, half)).unsqueeze(1).to(qkv.device)
    biases = (random(shape.qkv, dtype=dtype),) if shape.norms[0] == "layernorm" else ()
    compute = row.load()

    def apply(qkv: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = compute(qkv, bias, angle, shape.groups, shape.head_size)
        return found

    return Case(apply, (qkv, *biases), 2 * qkv.numel(), 2 * qkv.numel())


def bias_gelu(row: Implementation, shape: Shape, dtype: torch.dtype) -> Case:
    x, bias = random(shape.tokens, shape.mlp, dtype=dtype), random(shape.mlp, dtype=dtype)
    return Case(row.load(), (x, bias), 2 * x.numel(), 3 * x.numel())


def cross_entropy(row: Implementation, shape: Shape, dtype: torch.dtype) -> Case:
    logits = random(shape.tokens, 1, shape.vocab, dtype=dtype)
    labels = torch.randint(0, shape.vocab, (1, shape.tokens), device=current_device())
    compute = row.load()

    def apply(logits: Tensor) -> Tensor:
        given = logits * 1 if row.name.startswith("megatron") else logits  # megatron-core's overwrites even a leaf
        found: Tensor = compute(labels, given)
        return found

    return Case(apply, (logits,), logits.numel(), 2 * logits.numel())


CASES: dict[str, Callable[[Implementation, Shape, torch.dtype], Case]] = {
    "layernorm": norm,
    "rmsnorm": norm,
    "open_residual": open_residual,
    "split_rotated": split_rotated,
    "bias_gelu": bias_gelu,
    "cross_entropy": cross_entropy,
}


def print_adamw(dtype: torch.dtype, repeats: int) -> None:
    """Each row's step."""
    call = Call.on(current_device(), dtype, training=True)
    for row in operations_table()["adamw"].implementations:
        reason = row.why_not(call)
        print(
            f"{'adamw':>14} {row.name:>20} {reason or f'{milliseconds(adamw(row.load()), repeats, graph=False):.3f}'}"
        )


def adamw(found: AdamW) -> Run:
    parameters = [torch.randn(10_000_000, device=current_device(), requires_grad=True) for _ in range(16)]
    kind: Any = found.kind
    optimizer: Optimizer = kind(parameters, lr=1e-4)
    for group in optimizer.param_groups:
        group.update(found.settings)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
        optimizer.state[parameter].update(found.start(parameter))
    return optimizer.step


def bytes_per_ms(repeats: int) -> float:
    """What this machine's memory gives one reader and one writer."""
    values = torch.zeros(2**29, device=current_device(), dtype=torch.bfloat16)
    out = torch.empty_like(values)
    return 2**31 / milliseconds(lambda: torch.add(values, 1, out=out), repeats)


def milliseconds(run: Run, repeats: int, graph: bool = True) -> float:
    """The median after three that warm up."""
    if not torch.cuda.is_available():
        return statistics.median([waited_for(run) for _ in range(3 + repeats)][3:])
    replay = recorded(run) if graph else run
    for _ in range(3):
        replay()
    event: Any = partial(torch.cuda.Event, enable_timing=True)
    spans = [(event(), event()) for _ in range(repeats)]
    for start, end in spans:
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return float(statistics.median(start.elapsed_time(end) for start, end in spans))


def recorded(run: Run) -> Run:
    """As a CUDA graph."""
    new_stream: Any = torch.cuda.Stream
    stream = new_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def waited_for(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()

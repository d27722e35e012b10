"""Time Sep-Attention against dense attention and FlexAttention on this GPU, forward and forward + backward.

    python tools/bench_attention.py [--shapes 32,12,12,2048,64,64 ...] [--flex none|default|autotune] [--json FILE]

A shape is B,H,KV,S,D,window. Times are medians of CUDA graph replays in ms (FlexAttention: of a queue of calls).
"best" is the faster of torch's cuDNN and flash kernels on the same inputs in the same run; without one there is no
speed-up to print. Efficiency is best x visible share / ours: 1 if a visible pair cost what a pair costs in dense
attention. Ours includes the compaction of keys and values in every call; the plan, made once a micro-batch, is timed
apart. Memory is the peak beyond the inputs. "first" is the first forward and backward of ours in seconds: all of its
compilation if Triton's cache was empty (set TRITON_CACHE_DIR).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.flex import block_mask
from megatron_sep.kernels.sep_attention.index import indexed

DENSITY, SINKS = 0.15, 4
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Shape(NamedTuple):
    """A problem: rows, query heads, key heads, tokens, head size, window."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    size: int
    window: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """From "B,H,KV,S,D,window"."""
        return cls(*map(int, text.split(",")))


SHAPES = [
    Shape(32, 12, 12, 2048, 64, 64),
    Shape(32, 12, 12, 2048, 64, 128),
    Shape(16, 16, 16, 2048, 128, 64),
    Shape(4, 16, 16, 8192, 128, 256),
    Shape(4, 32, 8, 8192, 128, 256),
    Shape(1, 16, 16, 32768, 128, 256),
    Shape(1, 8, 8, 131072, 128, 256),
]


@dataclass
class Row:
    """One shape's figures: milliseconds (forward, forward + backward) a method, and MiB."""

    shape: Shape
    share: float
    plan_ms: float
    first_s: float
    ms: dict[str, tuple[float, float]]
    mib: dict[str, float]
    notes: dict[str, str]

    def best(self) -> tuple[float, float]:
        """The fastest dense times. Raises LookupError when the run has no dense baseline."""
        dense = [self.ms[name] for name in DENSE if name in self.ms]
        if not dense:
            raise LookupError(f"{self.shape}: no dense baseline in this run, so there is no speed-up: {self.notes}")
        return min(f for f, _ in dense), min(b for _, b in dense)

    def speed_up(self) -> tuple[float, float]:
        """Best dense time over ours."""
        return tuple(dense / ours for dense, ours in zip(self.best(), self.ms["ours"], strict=True))  # type: ignore[return-value]

    def efficiency(self) -> tuple[float, float]:
        """Speed-up x visible share."""
        return tuple(x * self.share for x in self.speed_up())  # type: ignore[return-value]


def inputs(shape: Shape, layout: str = "bhsd", seed: int = 0) -> list[Tensor]:
    """Random q, k, v and the output's gradient in bf16, [B, H, S, D] views of the layout in memory."""
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    generator = torch.Generator("cuda").manual_seed(seed)
    tensors = []
    for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads):
        full = (shape.batch, heads, shape.length, shape.size)
        memory = torch.randn([full[i] for i in order], device="cuda", dtype=torch.bfloat16, generator=generator)
        tensors.append(memory.permute([order.index(i) for i in range(4)]).requires_grad_())
    return tensors


def drawn_ids(shape: Shape, density: float = DENSITY, seed: int = 0) -> tuple[AttentionPattern, Tensor]:
    """A pattern and ids whose separators are independent draws."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ids = (torch.rand(shape.batch, shape.length, device="cuda", generator=generator) < density).long()
    return AttentionPattern(shape.window, SINKS, (1,)), ids


def milliseconds(run: Callable[[], Any], graph: bool = True, least: float = 60.0) -> float:
    """Median time of ``run``, from replays of a CUDA graph or from a queue of calls."""
    once = _timed(run, 1)[0]
    calls = max(1, min(10, int(4 / max(once, 1e-3))))
    if graph:
        captured = torch.cuda.CUDAGraph()
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(captured):
            for _ in range(calls):
                run()
        replay: Callable[[], Any] = captured.replay
    else:

        def replay() -> None:
            for _ in range(calls):
                run()

    each = _timed(replay, 2)[-1]
    return statistics.median(_timed(replay, max(5, min(50, int(least / max(each, 1e-3)))))) / calls


def _timed(run: Callable[[], Any], times: int) -> list[float]:
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]  # type: ignore[no-untyped-call]
    run()
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def peak_mib(run: Callable[[], Any]) -> float:
    """Peak memory of ``run`` beyond what was allocated before, MiB."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure(attention: Attention, tensors: list[Tensor], graph: bool = True) -> tuple[tuple[float, float], float]:
    """((forward, forward + backward) ms, MiB of one forward and backward)."""
    q, k, v, _ = tensors

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    both = partial(forward_backward, attention, tensors)
    return (milliseconds(forward, graph), milliseconds(both, graph)), peak_mib(both)


def forward_backward(attention: Attention, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """One forward and backward: the gradients of q, k and v."""
    q, k, v, do = tensors
    return torch.autograd.grad(attention(q, k, v), (q, k, v), do.detach())


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def dense(backend: SDPBackend, grouped: bool) -> Attention:
    """Causal attention through one of torch's kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    return attention


def flex(plan: MaskPlan, grouped: bool, autotune: bool) -> Attention:
    """FlexAttention under the plan; the mask is made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(plan)
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs" if autotune else None)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


def bench(shape: Shape, layout: str, flex_mode: str, density: float, max_landmarks: int | None) -> Row:
    """Every method on one shape; a method that fails leaves a note instead of a figure."""
    tensors = inputs(shape, layout)
    pattern, ids = drawn_ids(shape, density)
    plan = indexed(pattern.plan(ids, max_landmarks=max_landmarks))
    grouped = shape.heads != shape.kv_heads
    methods: dict[str, tuple[Attention, bool]] = {"ours": (lambda q, k, v: sep_attention(q, k, v, plan), True)}
    methods |= {name: (dense(backend, grouped), True) for name, backend in DENSE.items()}
    if flex_mode != "none":
        methods["flex"] = (flex(plan, grouped, flex_mode == "autotune"), False)
    first = seconds(partial(forward_backward, methods["ours"][0], tensors))
    plan_ms = milliseconds(lambda: indexed(pattern.plan(ids, max_landmarks=max_landmarks)))
    row = Row(shape, plan.map_share().item(), plan_ms, first, {}, {}, {})
    for name, (attention, graph) in methods.items():
        try:
            row.ms[name], row.mib[name] = measure(attention, tensors, graph)
        except Exception as error:
            if name == "ours":
                raise
            row.notes[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return row


def environment() -> dict[str, str]:
    """The GPU, its clocks now, and versions."""
    import triton

    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(),
        "clocks": subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
        "python": sys.version.split()[0],
    }


def line(row: Row) -> str:
    """One row of the table."""
    x = row.shape
    shape = f"{x.batch},{x.heads}/{x.kv_heads},{x.length},{x.size},{x.window}"
    (fast_f, fast_b), (eff_f, eff_b) = row.speed_up(), row.efficiency()
    cells = [shape, f"{row.share:.3f}", f"{row.plan_ms:.3f}", f"{row.first_s:.1f}"]
    for name in ("ours", *DENSE, "flex"):
        cells.append(" / ".join(f"{t:.3f}" for t in row.ms[name]) if name in row.ms else "-")
    cells += [f"{fast_f:.2f} / {fast_b:.2f}", f"{eff_f:.2f} / {eff_b:.2f}"]
    cells.append(" / ".join(f"{row.mib[name]:.0f}" if name in row.mib else "-" for name in ("ours", "cudnn")))
    return "| " + " | ".join(cells) + " |"


COLUMNS = "B,H/KV,S,D,n; visible; plan; first; ours fwd / f+b; cuDNN; flash; Flex; x best; efficiency; MiB ours / cuDNN"
HEADER = f"| {COLUMNS.replace(';', ' |')} |\n|{'---|' * len(COLUMNS.split(';'))}"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="B,H,KV,S,D,window")
    parser.add_argument("--layout", choices=("bhsd", "bshd", "sbhd"), default="bhsd", help="order of axes in memory")
    parser.add_argument("--flex", choices=("none", "default", "autotune"), default="none")
    parser.add_argument("--density", type=float, default=DENSITY, help="share of separators")
    parser.add_argument("--max-landmarks", type=int, help="promised to the kernel (default: all tokens of a row)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_attention: no CUDA device here; these figures come from a GPU or not at all")
    found = environment()
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    print(HEADER, flush=True)
    rows = []
    for shape in options.shapes:
        row = bench(shape, options.layout, options.flex, options.density, options.max_landmarks)
        rows.append(row)
        print(line(row), *(f"  {name}: {note}" for name, note in row.notes.items()), sep="\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "rows": [asdict(r) for r in rows]}))
    print("after:", environment()["clocks"])


if __name__ == "__main__":
    main()

"""Try launch settings of the kernels that pass over rows once, and print each one's three best beside what is shipped.

    python tools/tune_operations.py --shape 160m 1.4b llama

Needs a GPU. Times are medians in ms of CUDA graph replays.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from bench_operations import SHAPES, Shape, milliseconds

from megatron_sep.kernels.cross_entropy import triton as loss
from megatron_sep.kernels.gelu import triton as gelu
from megatron_sep.kernels.launch import Launch
from megatron_sep.kernels.norm import triton as norm
from megatron_sep.kernels.rotary import triton as rotary

Kernel = tuple[str, Callable[[], object], Callable[[Launch | None], None], list[Launch]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["160m", "1.4b"])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    for name in options.shape:
        for kernel in kernels(SHAPES[name]):
            report(name, kernel, options.repeats)


def report(shape: str, kernel: Kernel, repeats: int) -> None:
    name, run, use, launches = kernel
    shipped = milliseconds(run, repeats)
    timed = []
    for launch in launches:
        use(launch)
        timed.append((milliseconds(run, repeats), launch))
    use(None)
    best = "; ".join(f"{ms:.4f} {launch}" for ms, launch in sorted(timed, key=lambda pair: pair[0])[:3])
    print(f"{shape:>5} {name:>16} shipped {shipped:.4f}; {best}", flush=True)


def kernels(shape: Shape) -> Iterator[Kernel]:
    """A shape's kernels, with how to set their launch and what to try."""
    yield from norm_kernels(shape)
    yield from rotary_kernels(shape)
    yield from gelu_kernels(shape)
    logits = random(shape.tokens, 1, shape.vocab)
    labels = torch.randint(0, shape.vocab, (1, shape.tokens), device="cuda")
    summary = loss.logits_summary(logits, labels, 0, shape.vocab)
    backward = partial(
        loss.write_logits_gradient, logits, labels, *summary[:2], summary[2], torch.empty_like(logits), 0
    )
    rows = [
        Launch(rows=1, columns=c, warps=w, stages=s)
        for c, w, s in itertools.product((1024, 2048, 4096), (2, 4, 8), (1, 3))
    ]
    forward = partial(loss.logits_summary, logits, labels, 0, shape.vocab)
    yield "loss forward", forward, constant(loss, "FORWARD"), rows
    yield "loss backward", backward, constant(loss, "BACKWARD"), rows


def norm_kernels(shape: Shape) -> Iterator[Kernel]:
    x, dy, other, dstream = (random(shape.tokens, shape.hidden) for _ in range(4))
    weight, padded = random(shape.hidden), 1 << (shape.hidden - 1).bit_length()
    bias = weight if shape.norms[0] == "layernorm" else None
    one = [Launch(rows=r, warps=w) for r, w in itertools.product((1, 2, 4), (4, 8))]
    loops = [Launch(rows=r, warps=w, programs=p) for r, w, p in itertools.product((1, 2, 4), (4, 8), (2, 4, 8))]
    _, _, mean, rstd = norm.norms_forward(x, weight, bias, weight, bias, 1e-5)
    for name, second in (("norm", None), ("two norms", weight)):
        yield (
            f"{name} fwd",
            partial(norm.norms_forward, x, weight, bias, second, None if second is None else bias, 1e-5),
            entry(norm.FORWARD, padded),
            one,
        )
        extra = (None, None) if second is None else (other, dstream)
        yield (
            f"{name} bwd",
            partial(norm.norms_backward, dy, *extra, x, mean, rstd, weight, second, second is not None),
            entry(norm.BACKWARD, padded),
            loops,
        )


def rotary_kernels(shape: Shape) -> Iterator[Kernel]:
    length, padded = min(shape.tokens, 2048), 1 << (shape.head_size - 1).bit_length()
    qkv, bias = random(length, shape.tokens // length, shape.qkv), random(shape.qkv)
    half = int(shape.head_size * shape.rotary) // 2
    cos = torch.rand(length, 1, half, device="cuda")
    heads = rotary.split_rotated_forward(qkv, bias, cos, cos, shape.groups, shape.head_size)
    launches = [Launch(rows=r, warps=w) for r, w in itertools.product((16, 32, 64, 128), (4, 8))]
    loops = [Launch(rows=r, warps=w, programs=p) for r, w, p in itertools.product((16, 32, 64), (4, 8), (8, 16, 32))]
    yield (
        "rotary fwd",
        lambda: rotary.split_rotated_forward(qkv, bias, cos, cos, shape.groups, shape.head_size),
        entry(rotary.FORWARD, padded),
        launches,
    )
    yield (
        "rotary bwd",
        lambda: rotary.split_rotated_backward(*heads, cos, cos, True),
        entry(rotary.BACKWARD, padded),
        loops,
    )


def gelu_kernels(shape: Shape) -> Iterator[Kernel]:
    x, dout, bias = random(shape.tokens, shape.mlp), random(shape.tokens, shape.mlp), random(shape.mlp)
    sizes = list(itertools.product((2, 4, 8), (512, 1024), (4, 8)))
    loops = [
        Launch(rows=r, columns=c, warps=w, programs=p, stages=s)
        for (r, c, w), p, s in itertools.product(sizes, (8, 16), (1, 3))
    ]
    yield (
        "gelu fwd",
        lambda: gelu.bias_gelu_forward(x, bias),
        constant(gelu, "FORWARD"),
        [Launch(rows=r, columns=c, warps=w) for r, c, w in sizes],
    )
    yield "gelu bwd", lambda: gelu.bias_gelu_backward(dout, x, bias), constant(gelu, "BACKWARD"), loops


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def constant(module: ModuleType, name: str) -> Callable[[Launch | None], None]:
    """Sets a module's launch; None: as it was."""
    shipped = getattr(module, name)
    return lambda launch: setattr(module, name, shipped if launch is None else launch)


def entry(table: dict[int, Launch], padded: int) -> Callable[[Launch | None], None]:
    """Sets the launch for a padded size; None: as it was."""
    shipped: Any = table.get(padded)

    def use(launch: Launch | None) -> None:
        table[padded] = launch or shipped
        if table[padded] is None:
            del table[padded]

    return use


if __name__ == "__main__":
    main()

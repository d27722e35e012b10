"""Tokens per second of this project's training step beside a plain PyTorch model of the same shape, in one run.

    python tools/bench_training.py                       # the shapes of docs/performance.md, on one GPU
    python tools/bench_training.py --shape 16x2048 --profile --json out.json
    python tools/bench_training.py --layers 24 --width 2048 --heads 16 --shape 8x2048 1x16384

Four rows a shape: this project with full attention and with SepLLM in every layer; the peer (tools/peer_model.py) with
cuDNN's attention and with this project's kernel. Data are random tokens of which a share are separators. A step is all
that the training loop does but reading: plans, forward, backward, clipping and AdamW. Steps are timed in blocks, as a
loop runs them: the device is waited for at the end of a block. GiB is the most that the allocator took from the device.
"""

import argparse
import gc
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_model import peer_step

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import LossScaleConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.groups import process_groups
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.peak import peak_flops

VOCAB = 50304
SEPARATORS = tuple(range(9))
Step = Callable[[], object]
KINDS = {
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|s16816|splitKreduce",
    "attention": r"sdpa|flash|fmha|_kernel_fwd|gradient_kernel|_forward_kernel|compact|cudnn",
    "loss": r"log_softmax|logsumexp|nll|cross_entropy|loss",
    "activation": r"gelu|silu|swiglu",
    "norms": r"norm(?!al_)(?!.*multi_tensor)",
    "RoPE": r"rope|rotary|_cat_|cos|sin",
    "optimizer": r"multi_tensor|[aA]dam|lpnorm|foreach",
    "copies": r"[mM]emcpy|[mM]emset|copy|Fill",
    "plans": r"scan|scatter|cummax|cumsum|index",
}
"""Kinds of kernels by their names, the first that fits; the names of compiled kernels say what was fused."""


def main() -> None:
    options = parse()
    with process_groups(ParallelConfig(), seed=1) as topology:
        rows = [row for shape in options.shape for row in compare(shape, options, topology)]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    header = f"{machine}, bf16, {options.layers} layers of {options.width}"
    print(header)
    print(f"{'sequences':>10} {'':>18} {'ms/step':>9} {'tok/s':>10} {'MFU':>7} {'x peer':>7} {'busy':>6} {'GiB':>6}")
    for row in rows:
        print(
            f"{row['shape']:>10} {row['name']:>18} {row['ms']:>9.1f} {row['tokens_per_second']:>10,.0f} "
            f"{row['mfu']:>7.1%} {row['over_peer']:>7.2f} {row['busy']:>6.1%} {row['memory_gib']:>6.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": header, "rows": rows}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["16x2048", "2x16384"], help="sequences x tokens")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--density", type=float, default=0.15, help="share of separators")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks; the median counts")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block")
    parser.add_argument("--cuda-graphs", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--rows", nargs="+", default=[], metavar="OPERATION=ROW", help="instead of those of auto")
    parser.add_argument("--loss-chunk", type=int, help="tokens whose logits exist at once")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compare(shape: str, options: argparse.Namespace, topology: Topology) -> list[dict[str, Any]]:
    """This project with full and with Sep-Attention, and the peer with both, on the same data."""
    batch, length = (int(n) for n in shape.split("x"))
    ids_BT1 = random_rows(batch, length, options.density)
    patterns = {"full": AttentionPattern(), "sep": AttentionPattern(options.window, 4, SEPARATORS)}
    plan = patterns["sep"].plan
    sizes = (options.layers, options.width, options.heads, VOCAB)
    steps: dict[str, tuple[str, Callable[[], Step]]] = {
        "full": ("full", lambda: our_step(ids_BT1, patterns["full"], options, topology)),
        f"sep n={options.window}": ("sep", lambda: our_step(ids_BT1, patterns["sep"], options, topology)),
        "peer": ("full", lambda: peer_step(ids_BT1, None, *sizes)),
        "peer + kernel": ("sep", lambda: peer_step(ids_BT1, plan, *sizes)),
    }
    flops = {name: step_flops(ids_BT1, pattern, options) for name, pattern in patterns.items()}
    rows: list[dict[str, Any]] = []
    for name, (pattern, make) in steps.items():
        found = measure(make, options, f"{shape} {name}")
        tokens = ids_BT1.numel() - batch
        speed = {"tokens_per_second": tokens / found["ms"] * 1e3}
        mfu = flops[pattern] / found["ms"] * 1e3 / (peak_flops() or float("nan"))
        rows.append({"shape": shape, "name": name, **found, **speed, "mfu": mfu})
    peer = next(row for row in rows if row["name"] == "peer")
    return [row | {"over_peer": peer["ms"] / row["ms"]} for row in rows]


def our_step(ids_BT1: torch.Tensor, pattern: AttentionPattern, options: argparse.Namespace, topology: Topology) -> Step:
    """One step of the engine, as the loop calls it."""
    from megatron_sep.model.build import build_model
    from megatron_sep.train.megatron_engine import MegatronEngine
    from megatron_sep.train.microbatch import Microbatch

    config = model_config(ids_BT1, options)
    model = build_model(
        config,
        topology,
        vocab_size=VOCAB,
        precision="bf16",
        seed=1,
        compiled=True,
        loss_chunk=options.loss_chunk,
        other_backends=dict(choice.split("=") for choice in options.rows),
    )
    engine = MegatronEngine(
        model,
        topology,
        OptimizerConfig(),
        precision="bf16",
        loss_scale=LossScaleConfig(),
        sequence_length=config.sequence_length,
        micro_batch_size=len(ids_BT1),
        cuda_graphs=options.cuda_graphs,
    )
    rules = LayerRules(layer_patterns(pattern, config.num_layers), AttentionPattern(), None)
    rows = ids_BT1.pin_memory()

    def step() -> None:
        engine.forward_backward([Microbatch.of(rows, rules, topology.device)], 1)
        engine.step(1e-4)

    return step


def model_config(ids_BT1: torch.Tensor, options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        num_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=options.heads,
        sequence_length=ids_BT1.shape[1] - 1,
    )


def step_flops(ids_BT1: torch.Tensor, pattern: AttentionPattern, options: argparse.Namespace) -> float:
    """Of one step, counting the visible pairs alone."""
    config, ids_BT = model_config(ids_BT1, options), ids_BT1[:, :-1]
    pairs = float(pattern.plan(ids_BT).num_visible().sum()) * config.num_layers
    return ModelSize(config, VOCAB).training_flops(ids_BT.numel(), pairs)


def random_rows(batch: int, length: int, density: float) -> torch.Tensor:
    """Ids [B, T + 1] of which a share ``density`` are separators."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(SEPARATORS), VOCAB, (batch, length + 1), generator=generator)
    separator = torch.rand(ids.shape, generator=generator) < density
    return torch.where(separator, ids % len(SEPARATORS), ids)


def measure(make: Callable[[], Step], options: argparse.Namespace, title: str) -> dict[str, float]:
    """Time a step, which is made here and gone afterwards, or its memory would count in the next one's."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    seconds = block_seconds(step, options.blocks, options.steps)
    memory = torch.cuda.max_memory_reserved() / 2**30
    kinds = kernel_milliseconds(step, title if options.profile else None)
    busy = sum(kinds.values()) / (seconds * 1e3)
    return {"ms": seconds * 1e3, "busy": busy, "memory_gib": memory, "kinds": kinds}  # type: ignore[dict-item]


def block_seconds(step: Step, blocks: int, steps: int) -> float:
    """Median seconds of a step over blocks of them, after a block that warms up."""
    found = []
    for _ in range(blocks + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / steps)
    return statistics.median(found[1:])


def kernel_milliseconds(step: Step, title: str | None, count: int = 3) -> dict[str, float]:
    """Time on the GPU of one step by kind of kernel; with a title, the kernels that take most are printed too."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as measured:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in measured.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    kinds: dict[str, float] = defaultdict(float)
    for event in kernels:
        kinds[kind_of(event.key)] += event.self_device_time_total / 1e3 / count
    if title:
        print(f"\n{title}: {', '.join(f'{kind} {ms:.2f}' for kind, ms in sorted(kinds.items(), key=lambda k: -k[1]))}")
        for event in kernels[:30]:
            milliseconds, times = event.self_device_time_total / 1e3 / count, event.count // count
            print(f"{milliseconds:8.2f} ms {times:5d} x  {kind_of(event.key):>15}  {event.key[:110]}")
    return dict(kinds)


def kind_of(kernel: str) -> str:
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel)), "other")


if __name__ == "__main__":
    main()

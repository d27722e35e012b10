"""Tokens per second of this project's own training step, SepLLM against full attention, in one run.

    python tools/bench_training.py                       # the shapes of docs/performance.md, on one GPU
    python tools/bench_training.py --shape 16x2048 --window 64 --json out.json

Data are random tokens of which a share are separators. A step is everything the training loop does but reading: plans,
forward, backward, gradient clipping and AdamW.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import LossScaleConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.parallel.groups import process_groups
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.peak import peak_flops

VOCAB = 50304
SEPARATORS = tuple(range(9))


def main() -> None:
    options = parse()
    with process_groups(ParallelConfig(), seed=1) as topology:
        rows = [row for shape in options.shape for row in compare(shape, options, topology)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    header = f"{device}, torch {torch.__version__}, bf16, {options.layers} layers of {options.width}"
    print(header)
    print(f"{'sequences':>12} {'attention':>10} {'ms/step':>9} {'tok/s':>10} {'MFU':>7} {'over full':>10} {'GiB':>6}")
    for row in rows:
        print(
            f"{row['shape']:>12} {row['attention']:>10} {row['ms']:>9.1f} {row['tokens_per_second']:>10,.0f} "
            f"{row['mfu']:>7.1%} {row['over_full']:>10.2f} {row['memory_gib']:>6.1f}"
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
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def compare(shape: str, options: argparse.Namespace, topology: Topology) -> list[dict[str, Any]]:
    """Full attention, then SepLLM in every layer, on the same data."""
    batch, length = (int(n) for n in shape.split("x"))
    patterns = {"full": AttentionPattern(), "sep": AttentionPattern(options.window, 4, SEPARATORS)}
    rows: list[dict[str, Any]] = [
        {"shape": shape, "attention": name, **measure(batch, length, pattern, options, topology)}
        for name, pattern in patterns.items()
    ]
    for row in rows:
        row["over_full"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows


def measure(
    batch: int, length: int, pattern: AttentionPattern, options: argparse.Namespace, topology: Topology
) -> dict[str, float]:
    from megatron_sep.attention.rules import LayerRules
    from megatron_sep.model.build import build_model
    from megatron_sep.train.megatron_engine import MegatronEngine
    from megatron_sep.train.microbatch import Microbatch

    config = ModelConfig(
        num_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=options.heads,
        sequence_length=length,
    )
    gc.collect()  # the model before this one goes, or its memory would count
    torch.cuda.empty_cache()
    model = build_model(
        config, topology, vocab_size=VOCAB, precision="bf16", seed=1, compiled=torch.cuda.is_available()
    )
    engine = MegatronEngine(
        model,
        topology,
        OptimizerConfig(),
        precision="bf16",
        loss_scale=LossScaleConfig(),
        sequence_length=length,
        micro_batch_size=batch,
    )
    rules = LayerRules(layer_patterns(pattern, config.num_layers), AttentionPattern(), None)
    rows = random_rows(batch, length, options.density)
    pairs = float(Microbatch.of(rows, rules, topology.device).visible_pairs())

    def step() -> None:
        engine.forward_backward([Microbatch.of(rows, rules, topology.device)], 1)
        engine.step(1e-4)

    seconds = statistics.median(timed(step, options.steps))
    if options.profile:
        profile(step)
    flops = ModelSize(config, VOCAB).training_flops(batch * length, pairs) / seconds
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {
        "ms": seconds * 1e3,
        "tokens_per_second": batch * length / seconds,
        "mfu": flops / (peak_flops() or float("nan")),
        "memory_gib": memory,
    }


def random_rows(batch: int, length: int, density: float) -> torch.Tensor:
    """Ids [B, T + 1] of which a share ``density`` are separators."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(SEPARATORS), VOCAB, (batch, length + 1), generator=generator)
    separator = torch.rand(ids.shape, generator=generator) < density
    return torch.where(separator, ids % len(SEPARATORS), ids)


def timed(step: Any, count: int) -> Sequence[float]:
    """Seconds of each of ``count`` steps, after five that warm up; the device is waited for."""
    for _ in range(5):
        step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def profile(step: Any, count: int = 3) -> None:
    """Print the GPU's busy time of a step and the kernels that take most of it."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in measured.key_averages() if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    print(f"GPU busy {sum(event.self_device_time_total for event in kernels) / 1e3 / count:.1f} ms a step")
    for event in kernels[:24]:
        print(f"{event.self_device_time_total / 1e3 / count:8.2f} ms {event.count // count:5d} x  {event.key[:100]}")


if __name__ == "__main__":
    main()

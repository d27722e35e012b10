"""What speed to expect of each Pythia on this GPU: tokens/s, MFU and memory with full attention and with SepLLM n=64.

    python tools/bench_sizes.py [--models pythia-70m pythia-160m ...] [--json FILE]

A step is that of tools/bench_training.py, of sequences of 2,048 random tokens, 15 % of them separators, as many at once
as the table below says; nothing is recomputed. Each model is a process of its own, so one that does not fit says so and
the others go on.
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_training import SEPARATORS, measure, our_step, random_rows, step_flops

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.load import read_tree
from megatron_sep.config.schema import ParallelConfig
from megatron_sep.parallel.groups import process_groups
from megatron_sep.train.peak import peak_flops

SEQUENCES = {
    "pythia-14m": 32,
    "pythia-70m": 32,
    "pythia-160m": 16,
    "pythia-410m": 16,
    "pythia-1b": 8,
    "pythia-1.4b": 8,
    "pythia-2.8b": 4,
    "pythia-6.9b": 1,
}
LENGTH, WINDOW = 2048, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SEQUENCES), choices=SEQUENCES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process, and print JSON")
    options = parser.parse_args()
    if options.here:
        (model,) = options.models
        print(json.dumps(sizes_of(model)))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    found: list[dict[str, Any]] = []
    for model in options.models:
        command = [sys.executable, __file__, "--here", "--models", model]
        done = subprocess.run(command, capture_output=True, text=True)
        rows = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else []
        if not rows:
            print(
                f"{model}: {'does not fit' if 'OutOfMemoryError' in done.stderr else done.stderr[-1500:]}", flush=True
            )
        for row in rows:
            print(
                f"{model:>12} {row['name']:>5} {row['sequences']:>3} x {LENGTH} {row['ms']:>8.1f} ms "
                f"{row['tokens_per_second']:>10,.0f} tok/s {row['mfu']:>6.1%} MFU {row['memory_gib']:>6.1f} GiB",
                flush=True,
            )
        found += rows
    if options.json:
        about = {
            "date": f"{date.today()}",
            "gpu": torch.cuda.get_device_name(),
            "command": "python tools/bench_sizes.py",
        }
        options.json.write_text(json.dumps(about | {"rows": found}, indent=1))


def sizes_of(model: str) -> list[dict[str, Any]]:
    """The two rows of a model."""
    shape = read_tree(Path(__file__).parents[1] / "configs" / "models" / f"{model}.yaml")["model"]
    batch = SEQUENCES[model]
    options = argparse.Namespace(
        layers=shape["num_layers"],
        width=shape["hidden_size"],
        heads=shape["num_attention_heads"],
        loss_chunk=None,
        rows=[],
        cuda_graphs="auto",
        blocks=5,
        steps=8,
        profile=False,
    )
    ids_BT1 = random_rows(batch, LENGTH, density=0.15)
    patterns = {"full": AttentionPattern(), "sep": AttentionPattern(WINDOW, 4, SEPARATORS)}
    rows = []
    with process_groups(ParallelConfig(), seed=1) as topology:
        for name, pattern in patterns.items():
            found = measure(lambda pattern=pattern: our_step(ids_BT1, pattern, options, topology), options, name)  # type: ignore[misc]
            speed = {"tokens_per_second": batch * LENGTH / found["ms"] * 1e3}
            mfu = step_flops(ids_BT1, pattern, options) / found["ms"] * 1e3 / (peak_flops() or float("nan"))
            rows.append({"model": model, "name": name, "sequences": batch, **found, **speed, "mfu": mfu})
    return rows


if __name__ == "__main__":
    main()

"""Train one configuration on one GPU and under each layout of two: losses, speed and memory side by side.

    python tools/bench_layouts.py configs/runs/pythia-160m-sep-n64.yaml data.path=... [--steps 100] [--json FILE]
    python tools/bench_layouts.py CONFIG ... model.sequence_length=65536 --layouts "context 2"

Every run is the same `train` with the same data; what differs is how it is split. "x" is tokens/s over one GPU's;
"largest" and the means are differences of the training loss from one GPU's, in nats, in each --every steps, which are
logged: ranks wait for each other where a line is written. The first of --gpus is that of the run on one.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from trials import differences, losses, rates, trained, write

LAYOUTS = {
    "data 2": (),
    "tensor 2": ("parallel.tensor=2",),
    "sequence 2": ("parallel.tensor=2", "parallel.sequence_parallel=true"),
    "pipeline 2": ("parallel.pipeline=2",),
    "interleaved 2": ("parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "context 2": ("parallel.context=2",),
}
"""Settings on two GPUs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", help="section.key=value, of every run")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="steps from one line of the metrics to the next")
    parser.add_argument("--gpus", type=int, nargs=2, default=[0, 1])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; must not exist")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    length = f"train.steps={options.steps}", f"optimizer.decay_steps={options.steps}"
    quiet = f"metrics.every={options.every}", "train.eval_every=0", "checkpoint.every=1000000"
    settings = (*options.settings, *length, *quiet)
    one = trained(options.config, options.folder / "one", settings, options.gpus[:1])
    rows: dict[str, Any] = {"one GPU": rates(one)}
    show("one GPU", rows["one GPU"])
    for name in options.layouts:
        folder = options.folder / name.replace(" ", "-")
        try:
            run = trained(options.config, folder, (*settings, *LAYOUTS[name]), options.gpus)
        except subprocess.CalledProcessError as failed:
            print(f"{name:>14}: ended with {failed.returncode}; see {folder / 'said.txt'}", flush=True)
            continue
        found = rates(run)
        speed = {"x": found["tokens/s"] / rows["one GPU"]["tokens/s"]}
        rows[name] = found | speed | differences(losses(one), losses(run))
        show(name, rows[name])
    write(options.json, {"machine": torch.cuda.get_device_name(), "settings": settings, "rows": rows})
    if len(rows) <= len(options.layouts):
        sys.exit(1)


def show(name: str, row: dict[str, float]) -> None:
    print(f"{name:>14}: {', '.join(f'{key} {value:.4g}' for key, value in row.items())}", flush=True)


if __name__ == "__main__":
    main()

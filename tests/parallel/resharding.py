"""Trains, and takes up checkpoints of other layouts, one after another in one job.

torchrun --nproc-per-node N tests/parallel/resharding.py OUT RUN.yaml NAME section.key=value ... [-- SOURCE>NAME ...]

NAME trains in OUT/NAME. SOURCE>NAME begins at the newest checkpoint of OUT/SOURCE: it is saved again at once, to
OUT/"SOURCE>NAME at once", and then trained two steps more.
"""

import shutil
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from megatron_sep.config import load_config
from megatron_sep.parallel.groups import join_job, set_layout
from megatron_sep.parallel.topology import Topology

STEPS, MORE = 3, 2


def main() -> None:
    torch.set_num_threads(1)
    out, run, *rest = sys.argv[1:]
    join_job(timeout_minutes=5)
    for separator, words in groupby(rest, key=lambda word: word == "--"):
        if not separator:
            name, *overrides = words
            config = load_config(Path(run), overrides)
            turn(Path(out), Path(run), name, overrides, set_layout(config.parallel, config.train.seed))


def turn(out: Path, run: Path, name: str, overrides: list[str], topology: Topology) -> None:
    """Train, or take up and train on; in a layout that is set."""
    from megatron_sep.train.checkpoint import Checkpoints
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    source, taken_up, _ = name.partition(">")
    steps = STEPS + MORE if taken_up else STEPS
    config = load_config(run, [f"dir={out / name}", f"train.steps={steps}", *overrides])
    if taken_up:
        topology.tell(lambda: shutil.copytree(out / source / "checkpoints", out / name / "checkpoints"))
    built = build_run(config, topology)
    if taken_up:
        elsewhere = Checkpoints(out / f"{name} at once", None, topology)
        replace(built, saves=replace(built.saves, checkpoints=elsewhere)).save()
    train(built)


if __name__ == "__main__":
    main()

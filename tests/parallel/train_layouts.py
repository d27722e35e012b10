"""Trains the same tiny model under one parallel layout after another, in one job.

torchrun --nproc-per-node 2 tests/parallel/train_layouts.py OUT RUN.yaml NAME section.key=value ... [-- NAME ...]

Each layout trains in OUT/NAME; what it logs and saves there is what the tests look at. A run that is named twice goes
on where it stopped. One named "... pass by pass" takes the way of CUDA graphs, without a graph.
"""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megatron_sep.config import load_config
from megatron_sep.parallel.groups import join_job, set_layout


class PassByPass:
    """Stands for the recorder of CUDA graphs."""

    def run(self, _: str, compute: Any, batch: Any, *__: Any) -> Any:
        return compute(batch)


def main() -> None:
    torch.set_num_threads(1)
    out, run, *rest = sys.argv[1:]
    join_job(timeout_minutes=2)
    from megatron_sep.convert.convert import convert
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    for separator, words in groupby(rest, key=lambda word: word == "--"):
        if separator:
            continue
        name, *overrides = words
        config = load_config(Path(run), [f"dir={out}/{name}", *overrides])
        built = build_run(config, set_layout(config.parallel, config.train.seed), export=convert)
        if name.endswith("pass by pass"):
            built.engine._recorder = PassByPass()
        train(built)


if __name__ == "__main__":
    main()

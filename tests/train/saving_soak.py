"""Trains a tiny run with a save in the background every ten steps, and looks at its memory.

python tests/train/saving_soak.py RUN.yaml STEPS OUT.json

OUT.json: resident bytes and open files after each tenth of the steps, threads at the end.
"""

import gc
import json
import sys
import threading
from pathlib import Path

import psutil
import torch

from megatron_sep.config import load_config
from megatron_sep.config.schema import ParallelConfig
from megatron_sep.parallel.groups import process_groups
from megatron_sep.train.loop import train
from megatron_sep.train.outcomes import Outcome
from megatron_sep.train.run import build_run


def main() -> None:
    torch.set_num_threads(1)
    path, steps, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    found: list[int] = []
    files: list[int] = []
    with process_groups(ParallelConfig()) as topology:
        run = build_run(load_config(path, [f"train.steps={steps}", "checkpoint.every=10"]), topology)
        stepped = run.statistics.stepped

        def looked(outcome: Outcome) -> None:
            stepped(outcome)
            if (outcome.step * 10) % steps == 0:
                gc.collect()
                found.append(psutil.Process().memory_info().rss)
                files.append(psutil.Process().num_fds())

        run.statistics.stepped = looked  # type: ignore[method-assign]
        train(run)
    out.write_text(json.dumps({"bytes": found, "threads": threading.active_count(), "files": files}))


if __name__ == "__main__":
    main()

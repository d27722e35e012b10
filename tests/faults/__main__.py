"""Run the faults: `python -m faults [--full] [--only F1,F2] [--workers N] [--page FILE]`."""

import argparse
import gc
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path


def main() -> int:
    """0 where every trial was survived."""
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--full", action="store_true", help="all trials, not the fast subset")
    parser.add_argument("--only", default="", help="faults, or single trials of them, as F1,F4-10")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores + 1, help="trials at a time; some wait for a time-out")
    parser.add_argument("--page", type=Path, help="put the table into this page; with --only, rows of a full run")
    parser.add_argument("--dry", action="store_true", help="leave the page as it is")
    parser.add_argument("--folder", type=Path, help="keep what failed there; default: a temporary folder")
    asked = parser.parse_args()
    began = time.monotonic()
    from support.forked import import_everything

    from faults.page import update, update_rows
    from faults.processes import train_pair
    from faults.report import record, said
    from faults.server import run_trials
    from faults.table import FAULTS
    from faults.world import make_world

    only = asked.only.split(",")
    chosen = [fault for fault in FAULTS if not asked.only or fault.name in {name.split("-")[0] for name in only}]
    import_everything()
    imported = time.monotonic() - began
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    world = make_world(folder / "world")
    if any(fault.name in ("F1", "F16") for fault in chosen):
        train_pair(world)
    plan = [(fault, number) for fault in chosen for number in range(fault.full if asked.full else fault.fast)]
    if asked.only:
        plan = [(fault, number) for fault, number in plan if {fault.name, f"{fault.name}-{number}"} & set(only)]
    results = []
    for result in run_trials(plan, world, folder, asked.workers):
        results.append(result)
        if not result.survived:
            print(f"{result.fault} trial {result.number}: {'WRONG' if result.wrong else 'failed'}: {result.note}")
            print(f"  its files: {folder}/{result.fault}-{result.number}", flush=True)
    found = record(chosen, results, asked.full, imported, time.monotonic() - began)
    print(said(found))
    whole_classes = not any("-" in name for name in only)
    if asked.page and not asked.dry and whole_classes and (asked.full or not asked.only):
        print((update_rows if asked.only else update)(asked.page, asdict(found)))
    gc.unfreeze()  # or libraries complain of leaks at the end
    return 0 if all(result.survived for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Read mutated files: `python -m fuzz [--inputs N] [--from N] [READER ...]`; without --inputs, 900 of each reader."""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from fuzz.bounded import fuzz
from fuzz.readers import READERS


def main() -> int:
    """0 where every input ended as it should."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("readers", nargs="*", help="all where none is named")
    parser.add_argument("--inputs", type=int, default=900)
    parser.add_argument("--from", type=int, default=0, dest="start")
    asked = parser.parse_args()
    import torch

    import megatron_sep.report.curves
    import megatron_sep.weights.open_source  # noqa: F401

    torch.set_num_threads(1)
    folder, wrong = Path(tempfile.mkdtemp(prefix="fuzz-")), 0
    for name in asked.readers or READERS:
        began = time.monotonic(), os.times().children_user
        numbers = range(asked.start, asked.start + asked.inputs)
        faults = fuzz(READERS[name], folder / name.replace(" ", "-"), numbers, name)
        took, used = time.monotonic() - began[0], os.times().children_user - began[1]
        print(
            f"{name}: {len(numbers)} inputs, {len(faults)} wrong, {took:.0f} s, {used:.0f} of a processor", flush=True
        )
        for fault in faults:
            print(f"  {fault.number}: {fault.what}", flush=True)
        wrong += len(faults)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

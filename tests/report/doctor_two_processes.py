"""Examines a job of two ranks whose second one multiplies wrongly and is slow at attention.

torchrun --nproc-per-node 2 tests/report/doctor_two_processes.py OUT

OUT: the lines, and at last what ended it.
"""

import sys
import time
from pathlib import Path

from megatron_sep.config.schema import ParallelConfig
from megatron_sep.parallel.groups import process_groups
from megatron_sep.report import doctor_ranks
from megatron_sep.report.doctor_ranks import SickRankError, WrongResultError, examine


def wrong(_topology: object) -> object:
    def run() -> None:
        raise WrongResultError("1 of 4 values of a matrix product are wrong")

    return run


def slow(_topology: object) -> object:
    return lambda: time.sleep(0.2)


def quick(_topology: object) -> object:
    return lambda: time.sleep(0.01)


def main() -> None:
    with process_groups(ParallelConfig()) as topology:
        second = topology.process.rank == 1
        if second:
            doctor_ranks.CHECKS["matrix product"] = wrong
        doctor_ranks.CHECKS["attention against its reference"] = slow if second else quick
        lines = []
        try:
            lines += examine(topology)
        except SickRankError as error:
            lines.append(str(error))
        if topology.first:
            Path(sys.argv[1]).write_text("\n".join(lines))


if __name__ == "__main__":
    main()

"""GPUs by name: what they can compute, hold and move at most, from the vendors' data sheets; torch-free."""

import re
from dataclasses import dataclass

from megatron_sep.errors import UserError

PEAK_FLOPS = {
    r"H100 PCIe": 756e12,
    r"H100 NVL": 835e12,
    r"(H100|GH200)( (80|94|96|120|144|480) ?GB( HBM\dE?)?| SXM\d?.*)?$": 989e12,
    r"H200 NVL": 835e12,
    r"H200( \d+ ?GB.*)?$": 989e12,
    r"A100\b": 312e12,
    r"L40S$": 362e12,
    r"B200\b": 2250e12,
    r"RTX 4090$": 165e12,
    r"RTX 5090$": 209e12,
    r"MI300X": 1307e12,
    r"MI300A": 981e12,
}
"""Dense bf16 operations per second with fp32 sums, by the end of the name that torch gives the device; from the
vendors' data sheets."""


def peak_of(name: str) -> float | None:
    """Of the device that torch calls ``name``, or None where it is not known."""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}", name)), None)


class GpuError(UserError):
    """A GPU that no table here knows."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU as a planner sees it."""

    name: str
    """As torch begins it."""
    memory: float
    """Bytes that torch can have."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second that it receives from another GPU of its node."""

    @property
    def peak(self) -> float:
        """Dense bf16 operations a second."""
        peak = peak_of(self.name)
        assert peak is not None, f"{self.name} has no row in PEAK_FLOPS"
        return peak


GPUS = {
    "h100": Gpu("H100 80GB HBM3", 79.1 * 2**30, 3.35e12, 450e9),
    "h200": Gpu("H200", 139.8 * 2**30, 4.8e12, 450e9),
    "a100": Gpu("A100-SXM4-80GB", 79.1 * 2**30, 2.04e12, 300e9),
    "b200": Gpu("B200", 178.0 * 2**30, 8.0e12, 900e9),
    "l40s": Gpu("L40S", 44.4 * 2**30, 0.864e12, 32e9),
}
"""By the name that ``plan --gpu`` takes."""
NETWORK = 50e9
"""Bytes a second that a GPU receives from other machines: one port of 400 Gbit/s each."""
NODE = 8
"""GPUs of a machine."""


def find_gpu(name: str) -> Gpu:
    """Raises GpuError."""
    if name.lower() not in GPUS:
        raise GpuError(f"--gpu {name}: is not known; choose {', '.join(GPUS)}")
    return GPUS[name.lower()]

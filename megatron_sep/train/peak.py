"""What a device can compute at most, for the share of it that training uses."""

import re

import torch

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


def peak_flops() -> float | None:
    """Of this process's device, or None where it is not known."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_of(name: str) -> float | None:
    """Of the device that torch calls ``name``, or None where it is not known."""
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf"\b{known}", name)), None)

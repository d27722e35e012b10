"""GPUs by name."""

import pytest

from megatron_sep.config.gpus import GPUS, GpuError, find_gpu, peak_of
from megatron_sep.config.speeds import speeds_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 5090", 209e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10", None),
        ("Tesla T4", None),
    ],
)
def test_a_device_has_the_peak_of_its_own_kind_or_none(name: str, peak: float | None) -> None:
    """PCIe and NVL boards are slower than SXM ones of the same chip; what is not known has no MFU."""
    assert peak_of(name) == peak


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_that_can_be_planned_for_has_a_peak_and_speeds_below_its_data_sheet(name: str) -> None:
    """Whether its speeds were measured or scaled, and each says which."""
    gpu, speeds = find_gpu(name), speeds_of(name)
    assert speeds.matrix_flops < gpu.peak
    assert speeds.memory < gpu.bandwidth
    assert speeds.source.startswith(("docs/performance.md", "estimated"))


def test_a_gpu_that_is_not_known_is_told_with_those_that_are() -> None:
    """The message names the option and the way out."""
    with pytest.raises(GpuError, match=r"--gpu tpu: is not known; choose h100, h200"):
        find_gpu("tpu")

"""What this process's device can compute at most, for the share of it that training uses."""

import torch

from megatron_sep.config.gpus import peak_of


def peak_flops() -> float | None:
    """Of this process's device, or None where it is not known."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None

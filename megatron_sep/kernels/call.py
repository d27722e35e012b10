"""What is known of a call before it is made, as far as the choice of an implementation depends on it."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Call:
    """One call, or all that a model will make; what an operation has no use for stays at its default."""

    device: str
    """torch's device type: "cpu", "cuda"."""
    dtype: torch.dtype
    capability: tuple[int, int] = (0, 0)
    """The GPU's compute capability; (0, 0) where there is no GPU."""
    head_size: int = 0
    dropout: bool = False
    positive_scale: bool = True
    """Is the factor on the scores of attention greater than 0?"""
    biased: bool = False
    """Do scores fall with the distance of query and key (ALiBi)?"""
    adjusting: bool = False
    """Are the softmax's weights multiplied by its scores (self-adjusting softmax)?"""
    whole: bool = True
    """Are the queries all of the keys' tokens, not a span of them?"""
    even: bool = True
    """Is the plan's window all that a query sees but landmarks (``MaskPlan.even``)?"""
    training: bool = False
    """Will gradients flow?"""
    tensor_parallel: int = 1
    """Ranks that hold parts of each matrix, and of the vocabulary."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, **facts: Any) -> "Call":
        """A call whose tensors are on a device."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(device.type, dtype, capability, **facts)

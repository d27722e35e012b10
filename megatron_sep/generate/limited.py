"""A policy in a layer that has a sliding window of its own: a token sees what both let it see."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.streaming import Positions
from megatron_sep.generate.chunk import TokenPolicy


@dataclass(frozen=True)
class Limited:
    """``policy``, and of what it keeps the newest ``width`` tokens of the text alone, the query included."""

    policy: TokenPolicy
    width: int

    @property
    def sinks(self) -> int:
        """Those of the policy."""
        return self.policy.sinks

    @property
    def window(self) -> int | None:
        """The narrower of the two."""
        return self.width if self.policy.window is None else min(self.width, self.policy.window)

    @property
    def capacity(self) -> int | None:
        """That of the policy: tokens that nothing sees any more leave with the next eviction."""
        return self.policy.capacity

    @property
    def positions(self) -> Positions:
        """Those of the policy."""
        return self.policy.positions

    @property
    def evicts(self) -> bool:
        """Always: the reach of each token ends."""
        return True

    @property
    def bounded(self) -> bool:
        """As the policy."""
        return self.policy.bounded

    @property
    def of_prompt(self) -> "Limited":
        """In the same window."""
        return Limited(self.policy.of_prompt, self.width)

    def landmarks_at(self, ids_BT: Tensor, place_BT: Tensor) -> Tensor:
        """Those of the policy: bool [B, T]."""
        return self.policy.landmarks_at(ids_BT, place_BT)

    def reaches(self, landmark_BT: Tensor) -> Tensor:
        """At most ``width`` queries see a token: int32 [B, T]."""
        return self.policy.reaches(landmark_BT).clamp(max=self.width)

    def survivors(self, landmark_RC: Tensor, length_R: Tensor) -> Tensor:
        """Those of the policy, or all where tokens leave with their reach: bool [R, C]."""
        if self.capacity is not None:
            return self.policy.survivors(landmark_RC, length_R)
        return torch.arange(landmark_RC.shape[1], device=landmark_RC.device) < length_R[:, None]


def limited(policy: Any, width: int | None) -> Any:
    """A layer's policy in its sliding window; None: it has none."""
    if width is None:
        return policy
    return tuple(Limited(each, width) for each in policy) if isinstance(policy, tuple) else Limited(policy, width)

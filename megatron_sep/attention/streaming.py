"""What a cache of bounded size keeps of a stream without end (arXiv 2412.12094, section 3.2).

The tokens in the cache are, in the order of the text, four blocks: the first ``sinks`` tokens (a), kept separators (s),
the past window, and the last ``window`` tokens (w). When their number reaches ``capacity`` (c), the separators of the
past window join the separator block, of which the newest s stay, and the rest of the past window is dropped.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_sep.attention.pattern import FOREVER, check_number, is_separator, token_ids

Positions = Literal["cache", "text", "frozen"]
"""Which rotary position a token has: its index in the cache, moving when others leave; its index in the text; or, for
keys, the index in the cache it came in at ("no shift" in the paper's Table 8), for queries the cache's length."""
Prefill = Literal["compressed", "dense"]
"""How a prompt is read: like every other text, or whole, with evictions from the first token after it on."""


@dataclass(frozen=True)
class StreamingPattern:
    """A token is visible while the cache keeps it: what is kept depends on the ids of its own text alone."""

    sinks: int
    """a: first tokens of the text."""
    separators: int | None
    """s: newest separators kept beyond the window; None: all of them, whatever ``capacity`` says."""
    window: int
    """w: newest tokens that an eviction leaves."""
    capacity: int | None
    """c: tokens at which an eviction is due; None: never."""
    separator_ids: tuple[int, ...] = ()
    positions: Positions = "cache"
    prefill: Prefill = "compressed"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sinks", self.sinks, 0),
            ("separators", self.separators, 0),
            ("window", self.window, 1),
            ("capacity", self.capacity, 1),
        ):
            check_number(name, value, least)
        object.__setattr__(self, "separator_ids", token_ids(self.separator_ids))
        if self.positions not in ("cache", "text", "frozen"):
            raise ValueError(f"positions={self.positions!r}: choose 'cache', 'text' or 'frozen'")
        if self.prefill not in ("compressed", "dense"):
            raise ValueError(f"prefill={self.prefill!r}: choose 'compressed' or 'dense'")
        kept = self.sinks + (self.separators or 0) + self.window
        if self.capacity is not None and kept >= self.capacity:
            raise ValueError(
                f"sinks + separators + window = {kept} must be less than capacity = {self.capacity}, or an eviction "
                f"frees nothing; pass capacity={kept + 1} or more, or a smaller window"
            )

    @classmethod
    def streaming_llm(cls, sinks: int, recent: int, positions: Positions = "cache") -> "StreamingPattern":
        """StreamingLLM (arXiv 2309.17453): the first ``sinks`` and the last ``recent`` tokens, one in, one out."""
        return cls(sinks, 0, recent, sinks + recent + 1, (), positions)

    @property
    def evicts(self) -> bool:
        """Does a token ever leave?"""
        return self.capacity is not None

    @property
    def bounded(self) -> bool:
        """Does the cache stay at ``capacity`` tokens or fewer, whatever the text, but for a prompt read whole?"""
        return self.capacity is not None and self.separators is not None

    @property
    def of_prompt(self) -> "StreamingPattern":
        """What a prompt is read under: the pattern itself, or one that drops nothing."""
        return self if self.prefill == "compressed" else replace(self, capacity=None)

    @property
    def mean_size(self) -> float:
        """The paper's mean cache size (a + s + w + c) / 2 in tokens (eq. 4): of a text with separators enough."""
        if self.capacity is None or self.separators is None:
            return float("inf")
        return (self.sinks + self.separators + self.window + self.capacity) / 2

    def landmarks_at(self, ids_BT: Tensor, place_BT: Tensor) -> Tensor:
        """Which tokens are separators: bool [B, T]. Where a token stands (``place_BT``) does not matter."""
        del place_BT
        return is_separator(ids_BT, self.separator_ids)

    def reaches(self, landmark_BT: Tensor) -> Tensor:
        """Every token is seen until an eviction drops it: int32 [B, T], FOREVER."""
        return torch.full_like(landmark_BT, FOREVER, dtype=torch.int32)

    def survivors(self, landmark_RC: Tensor, length_R: Tensor) -> Tensor:
        """Which tokens an eviction leaves in caches of ``length_R`` tokens in the order of the text: bool [R, C]."""
        slot = torch.arange(landmark_RC.shape[1], device=landmark_RC.device)
        sink = slot < self.sinks
        in_window_RC = (slot >= length_R[:, None] - self.window) & (slot < length_R[:, None])
        found_RC = landmark_RC & ~sink & (slot < length_R[:, None] - self.window)
        if self.separators is not None:
            newest_first_RC = found_RC.flip(1).cumsum(1).flip(1)
            found_RC = found_RC & (newest_first_RC <= self.separators)
        return (sink & (slot < length_R[:, None])) | found_RC | in_window_RC

"""The rule of Sep-Attention (arXiv 2412.12094, section 3.1), written once; everything else asks it.

Query i sees key j iff ``j <= i``, both lie in the same document, and ``i - j < window`` or j is a landmark. For a given
key these queries are consecutive: ``j <= i < j + reach[j]``. One integer a token therefore holds the whole mask.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

FOREVER = 2**31 - 1
"""The reach of a landmark in a document without end."""


@dataclass(frozen=True)
class AttentionPattern:
    """Query i sees key j iff j <= i and (i - j < window or j is a landmark), both in the same document.

    Landmarks are the first ``sinks`` tokens of the document, every token of ``separator_ids`` and, after the sinks,
    every ``stride``-th token (FixLLM, section 4.7). The defaults are full causal attention.
    """

    window: int | None = None
    """Tokens, the query included; None: every earlier token."""
    sinks: int = 0
    separator_ids: tuple[int, ...] = ()
    stride: int | None = None
    capacity: ClassVar[None] = None
    """A cache under this rule keeps what can still be seen: nothing that is visible is ever dropped."""
    bounded: ClassVar[Literal[False]] = False
    positions: ClassVar[Literal["text"]] = "text"

    def __post_init__(self) -> None:
        for name, value, least in (("window", self.window, 1), ("sinks", self.sinks, 0), ("stride", self.stride, 1)):
            check_number(name, value, least)
        object.__setattr__(self, "separator_ids", token_ids(self.separator_ids))

    def landmarks(self, ids_BT: Tensor, document_BT: Tensor | None = None) -> Tensor:
        """Which tokens stay visible after they leave the window: bool [B, T].

        ``document_BT`` numbers the documents of a packed sequence, constant inside a document and changing between
        neighbours; None: the whole row is one document.
        """
        position_BT = _positions(ids_BT).expand_as(ids_BT)
        if document_BT is not None:
            position_BT = position_BT - _document_starts(document_BT)
        return self.landmarks_at(ids_BT, position_BT)

    def landmarks_at(self, ids_BT: Tensor, place_BT: Tensor) -> Tensor:
        """``landmarks`` of tokens whose places in their documents are given, from 0: as a cache meets them."""
        landmark_BT = place_BT < self.sinks
        if self.separator_ids:
            landmark_BT = landmark_BT | is_separator(ids_BT, self.separator_ids)
        if self.stride is not None:
            after_sinks_BT = place_BT - self.sinks + 1
            landmark_BT = landmark_BT | ((after_sinks_BT > 0) & (after_sinks_BT % self.stride == 0))
        return landmark_BT

    def reaches(self, landmark_BT: Tensor) -> Tensor:
        """How many consecutive queries see each token in a document without end, its own first: int32 [B, T]."""
        window = FOREVER if self.window is None else self.window
        return torch.where(landmark_BT, FOREVER, window).to(torch.int32)

    @property
    def evicts(self) -> bool:
        """Does the reach of any token end before its document does?"""
        return self.window is not None

    @property
    def of_prompt(self) -> "AttentionPattern":
        """What a prompt is read under: the pattern itself."""
        return self

    def survivors(self, landmark_RC: Tensor, length_R: Tensor) -> Tensor:
        """Which of the first ``length`` slots an eviction leaves, whatever their reach: all, bool [R, C]."""
        return _positions(landmark_RC) < length_R[:, None]

    def plan(
        self,
        ids_BT: Tensor,
        document_BT: Tensor | None = None,
        *,
        queries: range | None = None,
        max_landmarks: int | None = None,
    ) -> "MaskPlan":
        """Bind the pattern to token ids [B, T]: O(T) work and memory, no host synchronisation.

        ``document_BT`` is that of ``landmarks``. ``queries`` are the positions that attend, a consecutive span; None:
        all. ``max_landmarks`` promises that no row has more, so that the fused kernel needs less memory; a row that
        breaks the promise comes out of it as NaN. Raises ValueError for queries that are no positions of the row.
        """
        length = ids_BT.shape[1]
        landmark_BT = self.landmarks(ids_BT, document_BT)
        window = length if self.window is None else min(self.window, length)
        left_BT = torch.arange(length, 0, -1, device=ids_BT.device, dtype=torch.int32)
        start_BT = None
        if document_BT is not None:
            start_BT = _document_starts(document_BT).to(torch.int32)
            left_BT = left_BT - _document_starts(document_BT.flip(1)).to(torch.int32).flip(1)
        reach_BT = torch.minimum(left_BT, self.reaches(landmark_BT))
        most = self._max_landmarks(length, document_BT)
        most = most if max_landmarks is None else min(most, max_landmarks)
        causal = window == length and document_BT is None
        plan = MaskPlan(window, landmark_BT, reach_BT, causal, start_BT, most)
        return plan if queries is None else plan.of_queries(queries)

    def _max_landmarks(self, length: int, document_BT: Tensor | None) -> int:
        """The most landmarks a row can have, from what is known without looking at the ids."""
        if self.separator_ids or document_BT is not None:
            return length
        strided = 0 if self.stride is None else max(0, length - self.sinks) // self.stride
        return min(length, self.sinks + strided)


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """A pattern bound to a batch: one integer and a few values per key, never a tensor of queries by keys.

    The T keys of a row stand at the positions 0 to T - 1. The Q queries stand at all of these positions, or at a
    consecutive span of them: those of a chunk, of a rank, of the tokens that are new to a cache.
    """

    window: int
    """Tokens a query sees before it, itself included, whatever they are; at most T."""
    landmark_BT: Tensor
    """bool: seen by every later query of its document."""
    reach_BT: Tensor
    """int32: key j is seen by the queries j <= i < j + reach[j]; at least 1, and never past j's document."""
    causal: bool
    """Every position is a query and sees every earlier key of its row: plain causal attention."""
    start_BT: Tensor | None = None
    """int32: first position of each token's document; None: a row is one document."""
    max_landmarks: int | None = None
    """No row has more landmarks than this, known to the host; None: T."""
    span: range | None = None
    """The positions of the queries; None: all."""
    even: bool = True
    """Keys that are no landmarks are seen by ``window`` queries at most, and landmarks to the end of their document."""
    index: Any = None
    """What a kernel made of the keys once for all layers; only that kernel reads it."""

    @property
    def num_keys(self) -> int:
        """T"""
        return self.reach_BT.shape[1]

    @property
    def num_queries(self) -> int:
        """Q"""
        return self.reach_BT.shape[1] if self.span is None else len(self.span)

    @property
    def queries(self) -> range:
        """The positions of the queries."""
        return range(self.reach_BT.shape[1]) if self.span is None else self.span

    def of_queries(self, queries: range) -> "MaskPlan":
        """The same keys, seen by a part of the queries. Raises ValueError for positions that are no part of them."""
        own = self.queries
        if queries.step != 1 or not own.start <= queries.start <= queries.stop <= own.stop:
            raise ValueError(f"queries={queries}: the plan has {own}; pass a consecutive part of it")
        return self if queries == own else replace(self, span=queries, causal=False)

    def of_first_keys(self, count: int) -> "MaskPlan":
        """The first ``count`` keys, the only ones that the queries among them see."""
        if count == self.num_keys:
            return self
        left_T = torch.arange(count, 0, -1, device=self.reach_BT.device, dtype=torch.int32)
        return replace(
            self,
            window=min(self.window, count),
            landmark_BT=self.landmark_BT[:, :count].contiguous(),
            reach_BT=torch.minimum(self.reach_BT[:, :count], left_T),
            start_BT=None if self.start_BT is None else self.start_BT[:, :count].contiguous(),
            max_landmarks=None if self.max_landmarks is None else min(self.max_landmarks, count),
            index=None,
        )

    def seen_by(self, queries: range, keys: range) -> Tensor:
        """Which keys of a consecutive span any query of another one sees: bool [B, len(keys)]."""
        reach_BL = self.reach_BT[:, keys.start : keys.stop]
        position_L = torch.arange(keys.start, keys.stop, device=reach_BL.device)
        return (position_L < queries.stop) & (position_L + reach_BL > queries.start)

    def to(self, device: torch.device) -> "MaskPlan":
        """The same on another device, without what a kernel made of it."""
        landmark_BT, reach_BT = (x.to(device, non_blocking=True) for x in (self.landmark_BT, self.reach_BT))
        start_BT = None if self.start_BT is None else self.start_BT.to(device, non_blocking=True)
        return replace(self, landmark_BT=landmark_BT, reach_BT=reach_BT, start_BT=start_BT, index=None)

    def visible(self, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The rule on positions: does query q of row b see key k? Integer tensors that broadcast."""
        distance = q - k
        return (distance >= 0) & (distance < self.reach_BT[b, k])

    def dense(self) -> Tensor:
        """bool [B, Q, T], True where query (second axis) sees key (third): for reference attention and small plots."""
        batch, length = self.reach_BT.shape
        b = torch.arange(batch, device=self.reach_BT.device)[:, None, None]
        t = torch.arange(length, device=self.reach_BT.device)
        q = t if self.span is None else t[self.span.start : self.span.stop]
        return self.visible(b, q[:, None], t)

    def num_visible(self) -> Tensor:
        """Keys each query sees, int64 [B, Q], in O(T): the row sums of ``dense()``."""
        batch, length = self.reach_BT.shape
        position = torch.arange(length, device=self.reach_BT.device)
        gone_BT = torch.zeros(batch, length + 1, dtype=torch.int64, device=self.reach_BT.device)
        last_BT = position + self.reach_BT
        gone_BT.scatter_add_(1, last_BT, torch.ones_like(last_BT))
        seen_BT = position + 1 - gone_BT[:, :length].cumsum(1)
        return seen_BT if self.span is None else seen_BT[:, self.span.start : self.span.stop]

    def map_share(self) -> Tensor:
        """Share of the earlier keys that is visible, the queries' own included, float64 scalar.

        Of a whole plan that is the paper's "attention map" share (Table 3): of the lower triangle.
        """
        queries = self.queries
        earlier = (queries.start + 1 + queries.stop) * len(queries) / 2
        return self.num_visible().sum().double() / (len(self.reach_BT) * earlier)


def check_number(name: str, value: object, least: int) -> None:
    """Raises ValueError for what is neither None nor a whole number of at least ``least``."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be a whole number, is a {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}")


def token_ids(given: Any) -> tuple[int, ...]:
    """The ids in an iterable or a tensor, those of a set in order. Raises ValueError for what is no token id."""
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ValueError(f"separator_ids={given!r}: pass token ids, such as (13, 11, 30); a tokenizer knows them")
    values = given.flatten().tolist() if hasattr(given, "flatten") else list(given)
    wrong = [i for i in values if not hasattr(i, "__index__") or isinstance(i, bool)]
    if wrong:
        raise ValueError(f"separator_ids={wrong}: a token id is a whole number; look texts up in the tokenizer")
    ids = [int(i) for i in values]
    negative = [i for i in ids if i < 0]
    if negative:
        raise ValueError(f"separator_ids={negative}: a token id is never negative")
    return tuple(sorted(ids) if isinstance(given, set | frozenset) else ids)


def _positions(ids_BT: Tensor) -> Tensor:
    return torch.arange(ids_BT.shape[1], device=ids_BT.device)


def _document_starts(document_BT: Tensor) -> Tensor:
    """Index of the first token of each token's document."""
    first_BT = torch.ones_like(document_BT, dtype=torch.bool)
    first_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return torch.where(first_BT, _positions(document_BT), 0).cummax(1).values


def is_separator(ids_BT: Tensor, separator_ids: tuple[int, ...]) -> Tensor:
    """Which tokens are separators: bool, shaped like the ids."""
    table = _separator_table(separator_ids, ids_BT.device)
    return table[ids_BT.clamp(max=table.numel() - 1)]


@lru_cache(maxsize=16)
def _separator_table(separator_ids: tuple[int, ...], device: torch.device) -> Tensor:
    """bool, True at each separator; its last entry is False and stands for every id beyond the largest separator."""
    table = torch.zeros(max(separator_ids, default=-1) + 2, dtype=torch.bool)
    table[list(separator_ids)] = True
    return table.to(device)


def document_numbers(ids_BT: Tensor, eod_id: int) -> Tensor:
    """Number the documents of packed rows, int64 [B, T]; an end-of-document token closes its own document."""
    ends_BT = ids_BT == eod_id
    return ends_BT.cumsum(1) - ends_BT.long()

"""What a chunk of tokens does to a row of a cache, worked out on the host before any layer runs."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_sep.attention.pattern import FOREVER, MaskPlan
from megatron_sep.attention.streaming import Positions
from megatron_sep.kernels.sep_attention.index import indexed


class TokenPolicy(Protocol):
    """What decides from the ids alone how long a token is kept: AttentionPattern, StreamingPattern."""

    @property
    def sinks(self) -> int:
        """First tokens of a text that stay."""

    @property
    def window(self) -> int | None:
        """Newest tokens that stay; None: all."""

    @property
    def capacity(self) -> int | None:
        """Tokens at which an eviction is due; None: tokens leave when their reach ends."""

    @property
    def positions(self) -> Positions:
        """Which rotary position a token has."""

    @property
    def evicts(self) -> bool:
        """Does a token ever leave?"""

    @property
    def bounded(self) -> bool:
        """Are there never more than ``capacity`` tokens, whatever the text, but for a prompt that is read whole?"""

    @property
    def of_prompt(self) -> "TokenPolicy":
        """What a prompt is read under, up to the first pass with a single token."""

    def landmarks_at(self, ids_BT: Tensor, place_BT: Tensor) -> Tensor:
        """Which tokens outlive the window: bool [B, T]; ``place`` is that in their documents, from 0."""

    def reaches(self, landmark_BT: Tensor) -> Tensor:
        """How many consecutive queries see each token unless an eviction drops it: int32 [B, T]."""

    def survivors(self, landmark_RC: Tensor, length_R: Tensor) -> Tensor:
        """Which slots an eviction leaves of the first ``length``, tokens in the order of the text: bool [R, C]."""


@dataclass(frozen=True)
class RowState:
    """A row before a chunk. E slots are in use; int32 but ``landmark``."""

    place_E: Tensor
    """Position of the token in the text."""
    reach_end_E: Tensor
    """First text position that does not see the token."""
    landmark_E: Tensor
    """bool"""
    seen: int
    """Tokens of the text so far."""
    document: int
    """Text position where the document of the next token began."""
    stand_E: Tensor | None = None
    """Where the token stands, so far as distances are meant; None: at its position in the text."""


@dataclass(frozen=True)
class Segment:
    """Tokens ``begin`` to ``end - 1`` of a chunk, with no eviction between them, and what was kept before them."""

    begin: int
    end: int
    entries_E: Tensor
    """int64: what was in the cache and can be seen, then the tokens themselves, as indices of ``RowScript``."""
    plan: MaskPlan | None
    """Of one row: its keys are the entries, its queries the tokens among them. None: a single token sees all."""
    stand_E: Tensor
    """int32, on the host: where the entries stand, so far as distances are meant."""

    @property
    def past(self) -> int:
        """Entries that were in the cache before the segment."""
        return len(self.entries_E) - (self.end - self.begin)


@dataclass(frozen=True)
class RowScript:
    """The same for every layer. Entries are the slots in use, then the row's tokens."""

    columns_T: Tensor
    """int64: columns of the chunk that are not padding."""
    before: int
    """Slots in use before the chunk."""
    segments: tuple[Segment, ...]
    kept: Tensor
    """int64: entries that stay."""
    after: RowState
    """The row after the chunk: the state of ``kept``."""
    appends: bool
    """Does everything stay that was there before?"""
    live: int
    """Entries that a token saw, summed over the tokens."""
    full: int
    """Tokens of the text up to each token, summed over the tokens."""

    @property
    def text_positions(self) -> Tensor:
        """int64 [T]"""
        return torch.arange(self.after.seen - len(self.columns_T), self.after.seen)

    @property
    def cache_positions(self) -> Tensor:
        """Place in the cache that each token came in at: int64 [T]."""
        parts = [s.past + torch.arange(s.end - s.begin) for s in self.segments]
        return torch.cat(parts) if parts else torch.arange(0)


def plan_row(
    policy: TokenPolicy,
    state: RowState,
    ids_T: Tensor,
    columns_T: Tensor,
    document_end: int | None,
    device: torch.device,
    begins_T: Tensor | None = None,
    rollback: int = 0,
    stand_T: Tensor | None = None,
) -> RowScript:
    """The script of a row for its tokens ``ids_T`` (int64), which stand in ``columns_T`` of the chunk.

    ``device`` is that of the script's tensors, but for ``after``. ``begins_T`` is True where a packed document begins,
    whatever the ids are; ``stand_T`` is that of ``RowState``, None: the position in the text. Without a capacity, what
    the last ``rollback`` tokens saw stays too.
    """
    length, before, seen = len(ids_T), len(state.place_E), state.seen + len(ids_T)
    start_T1 = _document_starts(ids_T, begins_T, state, document_end)
    place_E, reach_end_E, landmark_E = _entries(policy, state, ids_T, start_T1[:-1])
    stand_E = place_E
    if state.stand_E is not None and stand_T is not None:
        stand_E = torch.cat([state.stand_E, stand_T.to(torch.int32)])
    segments, begin, live = [], 0, 0
    kept = torch.arange(before if start_T1[0] == state.document else 0)
    while begin < length:
        first, end = state.seen + begin, begin + _tokens_together(policy, start_T1[begin:-1], len(kept))
        kept = torch.cat([kept, torch.arange(before + begin, before + end)])
        seen_E = kept[reach_end_E[kept] > first]
        kept = kept[reach_end_E[kept] > first - rollback] if policy.capacity is None else kept
        plan = _plan(landmark_E[seen_E], reach_end_E[seen_E], first, end - begin, device)
        stands_E = stand_E[seen_E] if policy.positions == "text" else torch.arange(len(seen_E), dtype=torch.int32)
        segments.append(Segment(begin, end, seen_E.to(device), plan, stands_E))
        live += _sightings(place_E[seen_E], reach_end_E[seen_E], first, state.seen + end)
        if start_T1[end] != start_T1[begin]:
            kept = kept[:0]
        elif policy.capacity is not None and len(kept) >= policy.capacity:
            kept = kept[policy.survivors(landmark_E[kept][None], torch.tensor([len(kept)]))[0]]
        begin = end
    if policy.capacity is None:
        kept = kept[reach_end_E[kept] > seen - rollback]
    after = RowState(place_E[kept], reach_end_E[kept], landmark_E[kept], seen, int(start_T1[-1]), stand_E[kept])
    full = (state.seen + 1 + seen) * length // 2
    appends = len(kept) >= before and bool((kept[:before] == torch.arange(before)).all())
    return RowScript(columns_T.to(device), before, tuple(segments), kept.to(device), after, appends, live, full)


def end_of_reach(place: Tensor, reach: Tensor) -> Tensor:
    """First text position that does not see a token: place + reach without overflow, int32."""
    return (place.long() + reach.long()).clamp(max=FOREVER).to(torch.int32)


def _document_starts(ids_T: Tensor, begins_T: Tensor | None, state: RowState, document_end: int | None) -> Tensor:
    """Text position where the document of each token began, and of the one after the last: int32 [T + 1]."""
    begins_T1 = torch.zeros(len(ids_T) + 1, dtype=torch.bool)
    if document_end is not None:
        begins_T1[1:] = ids_T == document_end
    if begins_T is not None:
        begins_T1[:-1] |= begins_T
    place_T1 = state.seen + torch.arange(len(ids_T) + 1, dtype=torch.int32)
    return torch.where(begins_T1, place_T1, state.document).cummax(0).values.to(torch.int32)


def _entries(policy: TokenPolicy, state: RowState, ids_T: Tensor, start_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """place, reach_end and landmark of the slots in use, then of the new tokens: [E] each."""
    place_T = state.seen + torch.arange(len(ids_T), dtype=torch.int32)
    landmark_T = policy.landmarks_at(ids_T[None], (place_T - start_T)[None])[0]
    reach_end_T = end_of_reach(place_T, policy.reaches(landmark_T))
    both = zip((state.place_E, state.reach_end_E, state.landmark_E), (place_T, reach_end_T, landmark_T), strict=True)
    place_E, reach_end_E, landmark_E = (torch.cat(pair) for pair in both)
    return place_E, reach_end_E, landmark_E


def _tokens_together(policy: TokenPolicy, start_T: Tensor, kept: int) -> int:
    """How many of the next tokens belong to one document and come before the next eviction."""
    room = len(start_T) if policy.capacity is None else max(1, policy.capacity - kept)
    return int((start_T[:room] == start_T[0]).sum())


def _plan(landmark_E: Tensor, reach_end_E: Tensor, first: int, tokens: int, device: torch.device) -> MaskPlan | None:
    """Of the last ``tokens`` entries, which stand in the text from ``first`` on; None for a single one.

    Positions of the plan are the entries' indices: the query of index i stands at ``first - past + i`` in the text.
    """
    if tokens == 1:
        return None
    entries = len(landmark_E)
    past, index_E = entries - tokens, torch.arange(entries)
    reach_E = reach_end_E.long() - (first - past) - index_E
    window = min(entries, int(reach_E.min()))
    plan = MaskPlan(
        window,
        landmark_E[None].to(device),
        torch.minimum(reach_E, entries - index_E)[None].to(device, torch.int32),
        causal=window == entries,
        max_landmarks=int(landmark_E.sum()),
        even=past == 0,  # tokens of the past are seen as far as they were when they were new
    )
    return indexed(plan.of_queries(range(past, entries)))


def _sightings(place_E: Tensor, reach_end_E: Tensor, first: int, last: int) -> int:
    """Pairs of a query at a text position first .. last - 1 and an entry that it sees."""
    since, until = place_E.long().clamp(min=first), reach_end_E.long().clamp(max=last)
    return int((until - since).clamp(min=0).sum())

"""What a chunk of tokens does to a row of a cache, worked out on the host before any layer runs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.attention.pattern import FOREVER, AttentionPattern, MaskPlan
from megatron_sep.attention.streaming import StreamingPattern

TokenPolicy = AttentionPattern | StreamingPattern
"""What decides from the ids alone how long a token is kept."""


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


@dataclass(frozen=True)
class Segment:
    """Tokens of a chunk with no eviction between them, and what was in the cache before them."""

    begin: int
    end: int
    entries_E: Tensor
    """int64: what was in the cache and can be seen, then the tokens themselves, as indices of ``RowScript``."""
    plan: MaskPlan | None = None
    """The whole mask, where a document begins with the segment."""
    visible_TE: Tensor | None = None
    """bool, otherwise; None with ``plan``: a single token sees all entries."""

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
) -> RowScript:
    """The script of a row for its tokens ``ids_T``, which stand in ``columns_T`` of the chunk."""
    length, before = len(ids_T), len(state.place_E)
    starts = _document_starts(ids_T, state, document_end)
    place_T = state.seen + torch.arange(length, dtype=torch.int32)
    landmark_T = policy.landmarks_at(ids_T[None], (place_T - starts[:-1])[None])[0]
    place = torch.cat([state.place_E, place_T])
    reach_end = torch.cat([state.reach_end_E, end_of_reach(place_T, policy.reaches(landmark_T))])
    landmark = torch.cat([state.landmark_E, landmark_T])

    segments, kept, begin, live = [], torch.arange(before), 0, 0
    while begin < length:
        room = length if policy.capacity is None else max(1, policy.capacity - len(kept))
        end = begin + int((starts[begin : min(length, begin + room)] == starts[begin]).sum())
        kept = torch.cat([kept, torch.arange(before + begin, before + end)])
        kept = kept[reach_end[kept] > state.seen + begin]
        plan = visible_TE = None
        if end - begin > 1 and int(starts[begin]) == state.seen + begin:
            plan = _prefill_pattern(policy).plan(ids_T[None, begin:end].to(device))
        elif end - begin > 1:
            now = place_T[begin:end, None]
            visible_TE = ((place[kept] <= now) & (reach_end[kept] > now)).to(device)
        segments.append(Segment(begin, end, kept.to(device), plan, visible_TE))
        live += _sightings(place[kept], reach_end[kept], state.seen + begin, state.seen + end)
        if starts[end] != starts[begin]:
            kept = kept[:0]
        elif isinstance(policy, StreamingPattern) and policy.capacity is not None and len(kept) >= policy.capacity:
            kept = kept[policy.survivors(landmark[kept][None], torch.tensor([len(kept)]))[0]]
        begin = end
    seen = state.seen + length
    if policy.capacity is None:
        kept = kept[reach_end[kept] > seen]
    after = RowState(place[kept], reach_end[kept], landmark[kept], seen, int(starts[-1]))
    full = (state.seen + 1 + seen) * length // 2
    return RowScript(columns_T.to(device), before, tuple(segments), kept.to(device), after, live, full)


def end_of_reach(place: Tensor, reach: Tensor) -> Tensor:
    """First text position that does not see a token: place + reach without overflow, int32."""
    return (place.long() + reach.long()).clamp(max=FOREVER).to(torch.int32)


def _prefill_pattern(policy: TokenPolicy) -> AttentionPattern:
    """What tokens see up to the first eviction."""
    return policy if isinstance(policy, AttentionPattern) else AttentionPattern()


def _document_starts(ids_T: Tensor, state: RowState, document_end: int | None) -> Tensor:
    """Text position where the document of each token began, and of the one after the last: int32 [T + 1]."""
    starts = torch.full((len(ids_T) + 1,), state.document, dtype=torch.int32)
    if document_end is not None:
        for end in (ids_T == document_end).nonzero()[:, 0].tolist():
            starts[end + 1 :] = state.seen + end + 1
    return starts


def _sightings(place_E: Tensor, reach_end_E: Tensor, first: int, last: int) -> int:
    """Pairs of a query at a text position first .. last - 1 and an entry that it sees."""
    since, until = place_E.long().clamp(min=first), reach_end_E.long().clamp(max=last)
    return int((until - since).clamp(min=0).sum())

"""The plan of each segment of a chunk, against places and reaches taken one by one."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.chunk import RowScript, RowState, TokenPolicy, plan_row
from megatron_sep.kernels.sep_attention.index import KeyIndex

CPU = torch.device("cpu")
VOCABULARY, END = 5, 4


def empty() -> RowState:
    nothing = torch.zeros(0, dtype=torch.int32)
    return RowState(nothing, nothing, nothing.bool(), 0, 0)


@dataclass(frozen=True)
class Chunk:
    """A chunk of a text with its script and the row before it."""

    policy: TokenPolicy
    ids: list[int]
    before: RowState
    script: RowScript

    def entry(self, index: int) -> tuple[int, int]:
        """Text position of an entry, and the first one that does not see it, evictions aside."""
        state = self.before
        if index < len(state.place_E):
            return int(state.place_E[index]), int(state.reach_end_E[index])
        place = state.seen + index - len(state.place_E)
        landmark = self.policy.landmarks_at(torch.tensor([[self.ids[place]]]), torch.tensor([[self.place(place)]]))
        return place, place + int(self.policy.reaches(landmark))

    def place(self, position: int) -> int:
        """That of a text position in its document."""
        ends = [i for i, token in enumerate(self.ids[:position]) if token == END]
        return position - (ends[-1] + 1 if ends else 0)


@st.composite
def masks(draw: st.DrawFn) -> AttentionPattern:
    stride = draw(st.none() | st.integers(1, 4))
    return AttentionPattern(draw(st.none() | st.integers(1, 8)), draw(st.integers(0, 3)), (1, 2), stride)


@st.composite
def streams(draw: st.DrawFn) -> StreamingPattern:
    a, s, w = draw(st.integers(0, 2)), draw(st.integers(0, 3)), draw(st.integers(1, 4))
    capacity = draw(st.none() | st.integers(a + s + w + 1, a + s + w + 6))
    return StreamingPattern(a, s, w, capacity, (1, 2))


@st.composite
def chunks(draw: st.DrawFn) -> list[Chunk]:
    """Of one text, one after another; a document ends within it here and there."""
    policy, length = draw(masks() | streams()), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ids = torch.randint(0, VOCABULARY if draw(st.booleans()) else END, (length,), generator=generator)
    state, found, begin = empty(), [], 0
    while begin < length:
        end = draw(st.integers(begin + 1, length))
        script = plan_row(policy, state, ids[begin:end], torch.arange(end - begin), END, CPU)
        found.append(Chunk(policy, ids.tolist(), state, script))
        state, begin = script.after, end
    return found


def visible_by_hand(chunk: Chunk, entries: list[int], past: int) -> Tensor:
    """bool [T, E]: does each token of a segment see each of its entries?"""
    ends = [chunk.entry(entry) for entry in entries]
    now = [place for place, _ in ends[past:]]
    return torch.tensor([[place <= t < reach_end for place, reach_end in ends] for t in now])


@random_cases(2000)
@given(chunks())
def test_plan_of_a_segment_is_its_places_and_reaches(text: list[Chunk]) -> None:
    """Mask, counts and queries of every segment; a window that all see; landmarks as promised; causal as it says."""
    for chunk in text:
        live = 0
        for segment in chunk.script.segments:
            entries = segment.entries_E.tolist()
            visible_TE = visible_by_hand(chunk, entries, segment.past)
            live += int(visible_TE.sum())
            plan = segment.plan
            if plan is None:
                assert visible_TE.shape == (1, len(entries))
                assert visible_TE.all()
                continue
            assert plan.queries == range(segment.past, len(entries))
            assert torch.equal(plan.dense()[0], visible_TE)
            assert torch.equal(plan.num_visible()[0], visible_TE.sum(1))
            band_TE = torch.ones(len(entries), len(entries), dtype=torch.bool).tril().triu(1 - plan.window)
            assert visible_TE[band_TE[segment.past :]].all()
            assert plan.max_landmarks == int(plan.landmark_BT.sum())
            if plan.causal:
                assert segment.past == 0
                assert torch.equal(visible_TE, torch.ones_like(visible_TE).tril())
        assert live == chunk.script.live


@random_cases(200)
@given(masks(), st.integers(2, 40), st.integers(0, 2**32))
def test_plan_of_a_first_chunk_is_the_patterns_own(pattern: AttentionPattern, length: int, seed: int) -> None:
    """What the fused kernel reads of it too: window, landmarks and reach; its index is made with it."""
    ids = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    (segment,) = plan_row(pattern, empty(), ids, torch.arange(length), None, CPU).segments
    found, own = segment.plan, pattern.plan(ids[None])
    assert found is not None
    assert torch.equal(found.landmark_BT, own.landmark_BT)
    assert torch.equal(found.reach_BT, own.reach_BT)
    assert found.reach_BT.dtype == torch.int32
    assert found.window == (length if own.landmark_BT.all() else own.window)
    assert found.causal == (found.window == length)
    assert isinstance(found.index, KeyIndex) != found.causal


@pytest.mark.parametrize(
    ("policy", "evicts", "bounded"),
    [
        (AttentionPattern(), False, False),
        (AttentionPattern(window=3, sinks=1), True, False),
        (StreamingPattern(1, 2, 3, 9), True, True),
        (StreamingPattern(1, None, 3, 9), True, False),
        (StreamingPattern(1, 2, 3, None), False, False),
    ],
)
def test_what_a_policy_says_of_itself_is_what_long_texts_show(policy: TokenPolicy, evicts: bool, bounded: bool) -> None:
    """Whether tokens leave, and whether the number of slots is bounded whatever the text, here one of separators."""
    ids = torch.ones(60, dtype=torch.long)
    landmarks = policy.__class__(**{**vars(policy), "separator_ids": (1,)})
    kept = [
        len(plan_row(each, empty(), ids, torch.arange(60), None, CPU).after.place_E) for each in (policy, landmarks)
    ]
    assert (policy.evicts, policy.bounded) == (evicts, bounded)
    assert (kept[0] < 60) == evicts
    assert (policy.capacity is not None and max(kept) <= policy.capacity) == bounded

"""What the four blocks keep, against the paper's description played out with lists."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.chunk import RowState, plan_row

CPU = torch.device("cpu")


def empty() -> RowState:
    nothing = torch.zeros(0, dtype=torch.int32)
    return RowState(nothing, nothing, nothing.bool(), 0, 0)


def kept_places(pattern: StreamingPattern, ids: list[int]) -> list[int]:
    script = plan_row(pattern, empty(), torch.tensor(ids, dtype=torch.long), torch.arange(len(ids)), None, CPU)
    return script.after.place_E.tolist()


class Blocks:
    """The paper's section 3.2, with lists: sinks, separators, past and local window."""

    def __init__(self, pattern: StreamingPattern) -> None:
        self.pattern, self.seen = pattern, 0
        self.sinks: list[int] = []
        self.separators: list[int] = []
        self.window: list[tuple[int, bool]] = []

    def add(self, token: int) -> None:
        if len(self.sinks) < self.pattern.sinks:
            self.sinks.append(self.seen)
        else:
            self.window.append((self.seen, token in self.pattern.separator_ids))
        self.seen += 1
        if self.pattern.capacity is not None and len(self.tokens) >= self.pattern.capacity:
            past, self.window = self.window[: -self.pattern.window], self.window[-self.pattern.window :]
            self.separators += [place for place, is_separator in past if is_separator]
            if self.pattern.separators is not None:
                self.separators = self.separators[max(0, len(self.separators) - self.pattern.separators) :]

    @property
    def tokens(self) -> list[int]:
        return self.sinks + self.separators + [place for place, _ in self.window]


@st.composite
def streams(draw: st.DrawFn) -> tuple[StreamingPattern, list[int]]:
    a, s, w = draw(st.integers(0, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    pattern = StreamingPattern(a, s, w, a + s + w + draw(st.integers(1, 6)), (1,))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    noise = random.Random(draw(st.integers(0, 2**32)))
    return pattern, [int(noise.random() < density) for _ in range(draw(st.integers(0, 60)))]


@random_cases(2000)
@given(streams())
def test_blocks_keep_what_the_paper_says(case: tuple[StreamingPattern, list[int]]) -> None:
    """After every token: the lists' tokens; at most a sinks and s separators, the newest w and c in all, in order."""
    pattern, ids = case
    assert pattern.capacity is not None
    blocks, state, filled = Blocks(pattern), empty(), False
    for token in ids:
        blocks.add(token)
        script = plan_row(pattern, state, torch.tensor([token]), torch.arange(1), None, CPU)
        state = script.after
        kept = state.place_E.tolist()
        assert kept == blocks.tokens
        assert kept == sorted(set(kept))
        assert len(blocks.sinks) <= pattern.sinks
        assert len(blocks.separators) <= (pattern.separators or 0)
        filled = filled or len(blocks.window) >= pattern.window
        assert not filled or len(blocks.window) >= pattern.window
        assert len(kept) < pattern.capacity
        assert script.segments[0].past + 1 <= pattern.capacity
    assert kept_places(pattern, ids) == blocks.tokens


def test_golden_vectors() -> None:
    """Of the authors' code, and of StreamingLLM's (initial and recent tokens)."""
    separators = {2, 5, 8, 12}
    ids = [int(i in separators) for i in range(16)]
    assert kept_places(StreamingPattern(2, 3, 4, 12, (1,)), ids) == [0, 1, 2, 5, 8, 12, 13, 14, 15]
    assert kept_places(StreamingPattern.streaming_llm(4, 8), [0] * 20) == [0, 1, 2, 3, *range(12, 20)]


@pytest.mark.parametrize(
    ("sizes", "mean"),
    [
        ((4, 64, 256, 800), 562),
        ((4, 32, 224, 324), 292),
        ((4, 48, 224, 324), 300),
        ((4, 64, 224, 324), 308),
        ((4, 64, 320, 516), 452),
        ((4, 64, 512, 800), 690),
        ((4, 64, 720, 1024), 906),
        ((4, 64, 800, 1024), 946),
        ((4, 64, 928, 1280), 1138),
    ],
)
def test_mean_size_of_a_long_stream(sizes: tuple[int, int, int, int], mean: int) -> None:
    """Equation 4 on 40,000 tokens of the Pile's density, from the first eviction on, at the time of attention."""
    pattern = StreamingPattern(*sizes, (1,))
    assert pattern.mean_size == mean
    noise = random.Random(0)
    ids = torch.tensor([int(noise.random() < 0.115) for _ in range(40_000)])
    first = plan_row(pattern, empty(), ids[: sizes[3]], torch.arange(sizes[3]), None, CPU)
    rest = plan_row(pattern, first.after, ids[sizes[3] :], torch.arange(40_000 - sizes[3]), None, CPU)
    assert rest.live / (40_000 - sizes[3]) == pytest.approx(mean, rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 64, 256, 324), "sinks .* = 324 must be less than capacity = 324.*pass capacity=325"),
        ((-1, 64, 256, 800), "sinks=-1"),
        ((4, -2, 256, 800), "separators=-2"),
        ((4, 64, 0, 800), "window=0"),
        ((4, 64, 256, 800, (1,), "shifted"), "positions='shifted': choose"),
    ],
)
def test_sizes_that_cannot_work_are_refused(arguments: tuple[object, ...], message: str) -> None:
    """The message names the value and what to pass."""
    with pytest.raises(ValueError, match=message):
        StreamingPattern(*arguments)  # type: ignore[arg-type]


def test_all_separators_and_nothing_past_the_window_is_the_mask() -> None:
    """With every separator kept and an eviction at every token, a stream keeps what a query of the mask sees."""
    ids = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    stream = StreamingPattern(3, None, 10, 14, (1,))
    mask = AttentionPattern(window=11, sinks=3, separator_ids=(1,)).plan(ids[None]).dense()[0]
    state = empty()
    for t, token in enumerate(ids):
        script = plan_row(stream, state, token[None], torch.arange(1), None, CPU)
        seen = torch.cat([state.place_E, torch.tensor([t])]).tolist()
        assert seen == mask[t].nonzero()[:, 0].tolist()
        state = script.after

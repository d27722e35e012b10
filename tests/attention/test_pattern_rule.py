"""The rule of Sep-Attention against its definition, spelt out in loops, and against the paper's figures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern

VOCABULARY = 6


@st.composite
def bound_patterns(draw: st.DrawFn) -> tuple[AttentionPattern, torch.Tensor, torch.Tensor | None]:
    """A pattern, ids [B, T] and document numbers or None, all small."""
    batch, length = draw(st.integers(1, 2)), draw(st.integers(1, 13))
    pattern = AttentionPattern(
        window=draw(st.none() | st.integers(1, length + 2)),
        sinks=draw(st.integers(0, 4)),
        separator_ids=tuple(draw(st.sets(st.integers(0, VOCABULARY), max_size=3))),
        stride=draw(st.none() | st.integers(1, 5)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    packed = draw(st.booleans())
    document = (torch.rand(batch, length, generator=generator) < 0.2).cumsum(1) if packed else None
    return pattern, ids, document


def defined_mask(pattern: AttentionPattern, ids: torch.Tensor, document: torch.Tensor | None) -> torch.Tensor:
    """The paper's definition, pair by pair."""
    batch, length = ids.shape
    rows, numbers = ids.tolist(), (torch.zeros_like(ids) if document is None else document).tolist()
    window = length if pattern.window is None else pattern.window
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for q in range(length):
            for k in range(q + 1):
                position = k - numbers[b].index(numbers[b][k])
                landmark = position < pattern.sinks or rows[b][k] in pattern.separator_ids
                if pattern.stride is not None and position >= pattern.sinks:
                    landmark = landmark or (position - pattern.sinks + 1) % pattern.stride == 0
                mask[b, q, k] = numbers[b][q] == numbers[b][k] and (landmark or q - k < window)
    return mask


@random_cases(2000)
@given(bound_patterns())
def test_dense_mask_is_the_definition(case: tuple[AttentionPattern, torch.Tensor, torch.Tensor | None]) -> None:
    """``dense()`` is the definition for every window, landmarks and packing; ``num_visible()`` is its row sums."""
    pattern, ids, document = case
    plan = pattern.plan(ids, document)
    expected = defined_mask(pattern, ids, document)
    assert torch.equal(plan.dense(), expected)
    assert torch.equal(plan.num_visible(), expected.sum(2))
    if plan.causal:
        assert torch.equal(expected, torch.ones_like(expected).tril())


@random_cases(200)
@given(bound_patterns(), st.data())
def test_a_span_of_queries_is_rows_of_the_whole_plan(
    case: tuple[AttentionPattern, torch.Tensor, torch.Tensor | None], data: st.DataObject
) -> None:
    """Mask, counts and share of a span are those of its rows, cut from a plan, from a cut one, or planned at once."""
    pattern, ids, document = case
    whole, length = pattern.plan(ids, document), ids.shape[1]
    a, b, c, d = sorted(data.draw(st.lists(st.integers(0, length), min_size=4, max_size=4)))
    span = range(b, c)
    rows = whole.dense()[:, b:c]
    for plan in (whole.of_queries(span), whole.of_queries(range(a, d)).of_queries(span)):
        assert plan.queries == span
        assert plan.num_queries == c - b
        assert plan.causal == (whole.causal and span == range(length))
        assert torch.equal(plan.dense(), rows)
        assert torch.equal(plan.num_visible(), rows.sum(2))
    assert torch.equal(pattern.plan(ids, document, queries=span).dense(), rows)
    assert torch.equal(pattern.plan(ids, document, queries=range(length)).dense(), whole.dense())
    if span:
        pairs = len(ids) * sum(q + 1 for q in span)
        assert plan.map_share().item() == pytest.approx(int(rows.sum()) / pairs, rel=1e-12)


@pytest.mark.parametrize("queries", [range(2, 9), range(6, 3), range(2, 6, 2), range(-1, 3)], ids=str)
def test_queries_that_a_plan_does_not_have_are_an_error(queries: range) -> None:
    """The message names them and those that the plan has."""
    plan = AttentionPattern(2).plan(torch.zeros(1, 8, dtype=torch.long), queries=range(1, 7))
    with pytest.raises(ValueError, match=r"queries=range.*the plan has range\(1, 7\); pass a consecutive part"):
        plan.of_queries(queries)


# Table 3 of arXiv 2412.12094 on the Pile (S = 2048, density implied by the table), in per cent of the lower triangle.
SINKS, DENSITY, LENGTH = 3, 0.11517, 2048
GOLDEN_SHARES = [
    ("StreamingLLM n=64", 64, False, (), 6.43),
    ("SepLLM n=64", 64, True, (), 17.21),
    ("SepLLM n=128", 128, True, (), 22.47),
    ("H", 64, True, (0,), 24.11),
    ("H/T", 64, True, (0, -1), 31.01),
]


@pytest.mark.parametrize(("name", "window", "separators", "full", "share"), GOLDEN_SHARES)
def test_attention_map_shares_of_the_paper(
    name: str, window: int, separators: bool, full: tuple[int, ...], share: float
) -> None:
    """The visible share of the attention map, averaged over layers and random draws, is the paper's within 0.05."""
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(4096, LENGTH, generator=generator) < DENSITY).long()
    pattern = AttentionPattern(window, SINKS, separator_ids=(1,) if separators else ())
    plans = plan_layers(layer_patterns(pattern, 12, full), ids)
    shares = {plan: 100 * plan.map_share().item() for plan in set(plans)}
    measured = sum(shares[plan] for plan in plans) / len(plans)
    assert measured == pytest.approx(share, abs=0.05), name


FIGURE_3 = """
1.........
11........
111.......
1.11......
1..11.....
1..111....
1..1.11...
1..1..11..
1..1..111.
1..1..1.11
"""


def test_mask_of_figure_3() -> None:
    """The matrix of the paper's Figure 3 for ``ABC,DE.FG\\n``: one sink, a window of two."""
    text = "ABC,DE.FG\n"
    ids = torch.tensor([[ord(c) for c in text]])
    pattern = AttentionPattern(window=2, sinks=1, separator_ids=tuple(map(ord, ",.\n")))
    rows = ["".join("1" if seen else "." for seen in row) for row in pattern.plan(ids).dense()[0].tolist()]
    assert rows == FIGURE_3.split()

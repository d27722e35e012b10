"""Bilevel positions against a count by hand, whole and in pieces."""

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases
from torch import Tensor

from megatron_sep.attention.bilevel import Bilevel, Counts

SEPARATOR, END = 1, 2
RULE = Bilevel((SEPARATOR,), 40)


def by_hand(row: list[int], ends: bool, starts: list[int], real: list[bool], length: int) -> list[tuple[int, int]]:
    """Segment and place of each token of a row that is no padding, one token after another."""
    found, segment, place, begins = [], 0, 0, False
    for i, token in enumerate(row):
        if not real[i]:
            continue
        if begins or i in starts:
            segment = place = 0
        found.append((segment, min(place, length - 1)))
        begins = ends and token == END
        segment, place = (segment + 1, 0) if token == SEPARATOR else (segment, place + 1)
    return found


def test_the_example_of_the_notes() -> None:
    """a b S c S S d: a separator belongs to the segment that it ends."""
    segment, place = RULE.positions(torch.tensor([[5, 6, 1, 7, 1, 1, 8]]))[:, 0]
    assert segment.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert place.tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_a_place_beyond_the_last_is_the_last() -> None:
    """The learned table has an end, and positions do not leave it."""
    assert Bilevel((1,), 3).positions(torch.zeros(1, 6, dtype=torch.long))[1].tolist() == [[0, 1, 2, 2, 2, 2]]


@random_cases(2000)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 24), ends=st.booleans(), limit=st.sampled_from([3, 40]))
def test_tokens_are_counted_as_by_hand_however_a_text_is_cut(seed: int, length: int, ends: bool, limit: int) -> None:
    """Any separators, ends and starts of documents, padding, and cuts into chunks."""
    random = Random(seed)
    rows = random.randint(1, 3)
    ids = [random.choices([SEPARATOR, END, 5, 6, 7], k=length) for _ in range(rows)]
    real = [random.choices([True, random.random() < 0.5], k=length) for _ in range(rows)]
    starts = [random.sample(range(length), random.randint(0, min(2, length))) for _ in range(rows)]
    cuts = sorted({*random.choices(range(1, length + 1), k=2), length})
    rule, found = Bilevel((SEPARATOR,), limit), _in_chunks(Bilevel((SEPARATOR,), limit), ids, ends, starts, real, cuts)
    for row in range(rows):
        begun = [i for i in starts[row] if real[row][i]]
        expected = by_hand(ids[row], ends, begun, real[row], rule.length)
        kept = torch.tensor(real[row])
        assert list(zip(*found[:, row, kept].tolist(), strict=True)) == expected


def _in_chunks(
    rule: Bilevel, ids: list[list[int]], ends: bool, starts: list[list[int]], real: list[list[bool]], cuts: list[int]
) -> Tensor:  # fmt: skip
    ids_BT, real_BT = torch.tensor(ids), torch.tensor(real)
    starts_BT = torch.zeros_like(real_BT)
    for row, places in enumerate(starts):
        starts_BT[row, places] = True
    counts, parts, begin = Counts.start(len(ids), torch.device("cpu")), [], 0
    for cut in cuts:
        part = slice(begin, cut)
        ends_BT = ids_BT[:, part] == END if ends else None
        positions, counts = rule.counted(ids_BT[:, part], counts, ends_BT, starts_BT[:, part], real_BT[:, part])
        parts.append(positions)
        begin = cut
    return torch.cat(parts, 2)


@pytest.mark.parametrize("boundaries", [False, True])
def test_documents_begin_again_where_boundaries_count(boundaries: bool) -> None:
    """Through the rules of a run, as training asks them."""
    from megatron_sep.attention.pattern import AttentionPattern
    from megatron_sep.attention.rules import LayerRules

    rules = LayerRules((AttentionPattern(),), AttentionPattern(), END if boundaries else None, RULE)
    segment, place = rules.positions(torch.tensor([[5, 1, 5, 2, 5, 1, 5]]))[:, 0]
    assert segment.tolist() == ([0, 0, 1, 1, 0, 0, 1] if boundaries else [0, 0, 1, 1, 1, 1, 2])
    assert place.tolist() == ([0, 1, 0, 1, 0, 1, 0] if boundaries else [0, 1, 0, 1, 2, 3, 0])

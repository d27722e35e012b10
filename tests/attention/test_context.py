"""What a context-parallel rank needs of the others: what its queries see, nothing else, in the order of the text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import random_cases
from support.context import attend_in_ranks, shares
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_sep.attention.context import context_plan
from megatron_sep.attention.pattern import AttentionPattern, MaskPlan, document_numbers
from megatron_sep.config.traffic import all_gather_bytes, landmark_bytes, ulysses_bytes
from megatron_sep.parallel.exchange import Route, gather_keys
from megatron_sep.parallel.share import Share

END = 9


@st.composite
def cases(draw: st.DrawFn) -> tuple[MaskPlan, int]:
    """A plan over rows of a length that divides by twice the ranks, with documents or without; and the ranks."""
    ranks = draw(st.integers(1, 5))
    length = 2 * ranks * draw(st.integers(1, 6))
    rows = draw(st.integers(1, 3))
    ids = draw(st.lists(st.lists(st.integers(0, END), min_size=length, max_size=length), min_size=rows, max_size=rows))
    pattern = AttentionPattern(
        draw(st.none() | st.integers(1, length)), draw(st.integers(0, 3)), draw(st.sampled_from([(), (1,), (1, 2, 3)])),
        draw(st.none() | st.integers(1, 5)),
    )  # fmt: skip
    ids_BT = torch.tensor(ids)
    documents = document_numbers(ids_BT, END) if draw(st.booleans()) else None
    return pattern.plan(ids_BT, documents), ranks


@random_cases(2000)
@given(cases())
def test_each_query_sees_what_it_sees_in_the_whole_sequence(case: tuple[MaskPlan, int]) -> None:
    """Slot by slot: a query sees a slot iff it holds a key that the query sees, and all of those are in a slot."""
    plan, ranks = case
    whole = plan.dense()
    length = plan.num_keys
    for share in shares(length, ranks):
        mine = context_plan(plan, share)
        key_BK = keys_in_slots(mine.route, share, plan, ranks)
        for span, part in zip(share.spans, mine.parts, strict=True):
            expected = torch.zeros(len(whole), len(span), length + 1, dtype=torch.bool)
            found = expected.clone()
            expected[:, :, :length] = whole[:, span.start : span.stop]
            where = key_BK[:, None, : part.num_keys].expand(-1, len(span), -1)
            found.scatter_(2, where, part.dense())
            assert torch.equal(found, expected)
            assert torch.equal(part.num_visible(), whole[:, span.start : span.stop].sum(2))


def keys_in_slots(route: Route, share: Share, plan: MaskPlan, ranks: int) -> Tensor:
    """The position of the key in each slot, int64 [B, slots]; T in an empty one."""
    batch, length = plan.reach_BT.shape
    position_BT = torch.arange(length).expand(batch, length)
    found = torch.full((route.num_slots * batch,), length)
    for span, slots in zip(share.spans, route.own_slots, strict=True):
        for b in range(batch):
            found[torch.arange(slots.start, slots.stop) * batch + b] = torch.arange(span.start, span.stop)
    sent = []
    for other in shares(length, ranks):
        route_there = context_plan(plan, other).route
        tokens = route_there.sent.split(route_there.num_sent)[share.rank]
        sent.append(other.take(position_BT).T.flatten()[tokens])
    assert [len(tokens) for tokens in sent] == list(route.num_received)
    found[route.slots] = torch.cat(sent)
    return found.unflatten(0, (-1, batch)).T


@random_cases(2000)
@given(cases())
def test_only_what_is_seen_travels(case: tuple[MaskPlan, int]) -> None:
    """A rank receives the keys of others that one of its queries sees, each once, and no more."""
    plan, ranks = case
    whole = plan.dense()
    for share in shares(plan.num_keys, ranks):
        own = torch.zeros(plan.num_keys, dtype=torch.bool)
        for span in share.spans:
            own[span.start : span.stop] = True
        seen = whole[:, own].any(1) & ~own
        route = context_plan(plan, share).route
        assert sum(route.num_received) == int(seen.sum())
        assert route.num_received[share.rank] == 0 == route.num_sent[share.rank]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients_are_those_of_the_whole_sequence(ranks: int, window: int | None, packed: bool) -> None:
    """Rows of 96 tokens, grouped heads: in fp64 within 1e-12, of the output and of every gradient."""
    draw = torch.Generator().manual_seed(ranks)
    ids = torch.randint(0, END + 1, (3, 96), generator=draw)
    plan = AttentionPattern(window, 2, (1, 2)).plan(ids, document_numbers(ids, END) if packed else None)
    whole, split = ([draw_one(seed, heads) for seed, heads in enumerate((4, 2, 2))] for _ in range(2))
    expected = scaled_dot_product_attention(*whole, attn_mask=plan.dense()[:, None], enable_gqa=True)
    found = attend_in_ranks(*split, plan, ranks)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=draw)
    for out in (expected, found):
        (out * weight).sum().backward()
    assert torch.allclose(found, expected, atol=1e-12)
    for one, other in zip(whole, split, strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-12)


def draw_one(seed: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, 96, 8, dtype=torch.float64, generator=generator).requires_grad_()


def test_the_ranks_share_a_sequence_and_its_work_evenly() -> None:
    """Every token has one rank, chunks are mirrored, and each rank has the same number of causal pairs, within 1%."""
    for ranks in (1, 2, 8):
        spans = [span for share in shares(4096, ranks) for span in share.spans]
        assert sorted(i for span in spans for i in span) == list(range(4096))
        work = [sum(i + 1 for span in share.spans for i in span) for share in shares(4096, ranks)]
        assert max(work) == min(work)
    values = torch.arange(24).view(2, 12)
    assert Share(1, 3, 12).take(values).tolist() == [[2, 3, 8, 9], [14, 15, 20, 21]]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_receives_the_bytes_of_the_formula(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every eighth token a separator: what the exchange of each rank fetches, forward and back, byte for byte."""
    received: list[int] = []

    def counted(out: Tensor, *_: object, **__: object) -> None:
        received.append(out.nbytes)
        out.zero_()

    monkeypatch.setattr("torch.distributed.all_to_all_single", counted)
    rows, length, window, heads, size = 2, 4096, 65, 2, 16
    ids = (torch.arange(length) % 8 == 0).long().expand(rows, length)
    plan = AttentionPattern(window, separator_ids=(1,)).plan(ids)
    for share in shares(length, ranks):
        shape = (length // ranks, rows, heads, size)
        k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        route = context_plan(plan, share).route
        gathered = gather_keys(k, v, route, None)
        torch.cat(gathered).sum().backward()
        formula = landmark_bytes(rows, length, heads * size, ranks, share=1 / 8, window=window, rank=share.rank)
        assert received == [formula, sum(route.num_sent) * 4 * heads * size]
        received.clear()


def test_the_formulae_say_what_was_promised() -> None:
    """131,072 tokens, 8 ranks, 1024 wide, 15 % landmarks, a window of 256: 470, 117 and 71 MB a layer."""
    sizes = (1, 131_072)
    assert all_gather_bytes(*sizes, 1024, 8) / 1e6 == pytest.approx(469.8, abs=0.1)
    assert ulysses_bytes(*sizes, 1024, 1024, 8) / 1e6 == pytest.approx(117.4, abs=0.1)
    assert landmark_bytes(*sizes, 1024, 8, share=0.15, window=256) / 1e6 == pytest.approx(71.4, abs=0.1)

"""The reference, FlexAttention and the front door of Sep-Attention on CPU."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import random_cases
from torch.nn.functional import pad

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.kernels import operation, registry
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.flex import block_any_all, block_mask


def drawn_plan(generator: torch.Generator, length: int) -> MaskPlan:
    """A plan of one row: window, sinks, separator density, stride and documents at random."""

    def draw(high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=generator))

    window = (1, 1 + draw(length), None)[min(draw(8), 2)] if draw(4) == 0 else 1 + draw(length)
    pattern = AttentionPattern(window, draw(5), (1,), stride=(None, 1 + draw(9))[draw(3) == 0])
    density = (0.0, 0.15, 0.5, 1.0)[draw(4)]
    ids = (torch.rand(1, length, generator=generator) < density).long()
    document = (torch.rand(1, length, generator=generator) < 0.05).cumsum(1) if draw(2) else None
    return pattern.plan(ids, document)


def stacked(plans: list[MaskPlan]) -> MaskPlan:
    """Rows of different patterns in one batch: the reach alone is the mask."""
    return MaskPlan(
        window=max(plan.window for plan in plans),
        landmark_BT=torch.cat([plan.landmark_BT for plan in plans]),
        reach_BT=torch.cat([plan.reach_BT for plan in plans]),
        causal=False,
        even=False,
    )


def qkv(batch: int, heads: int, kv_heads: int, length: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Random queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, length, size, generator=generator) for h in (heads, kv_heads, kv_heads)]


def drawn_span(generator: torch.Generator, length: int) -> range:
    """At least one position of a row."""
    a, b = torch.randint(0, length, (2,), generator=generator).sort().values.tolist()
    return range(a, b + 1)


@random_cases(2000)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 40), block=st.sampled_from([1, 4, 16, 32]))
def test_block_table_is_any_and_all_of_the_dense_mask(seed: int, length: int, block: int) -> None:
    """The block table made from reach alone marks exactly the blocks that the dense mask touches and fills."""
    plan = drawn_plan(torch.Generator().manual_seed(seed), length)
    some, every = block_any_all(plan, block)
    missing = -length % block
    dense = plan.dense()
    blocks = (length + missing) // block
    seen = pad(dense, (0, missing, 0, missing)).view(1, blocks, block, blocks, block)
    unseen = pad(~dense, (0, missing, 0, missing)).view(1, blocks, block, blocks, block)
    assert torch.equal(some, seen.any(4).any(2))
    assert torch.equal(every, ~unseen.any(4).any(2))


@random_cases(1000)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 40), block=st.sampled_from([1, 4, 16, 32]))
def test_block_table_of_a_span_is_any_and_all_of_its_rows(seed: int, length: int, block: int) -> None:
    """Blocks of queries begin where the span begins, blocks of keys at the first key."""
    generator = torch.Generator().manual_seed(seed)
    plan = drawn_plan(generator, length).of_queries(drawn_span(generator, length))
    some, every = block_any_all(plan, block)
    dense = plan.dense()
    padding = (0, -length % block, 0, -plan.num_queries % block)
    tiles = [pad(mask, padding)[0].unfold(0, block, block).unfold(1, block, block) for mask in (dense, ~dense)]
    assert torch.equal(some[0], tiles[0].any(3).any(2))
    assert torch.equal(every[0], ~tiles[1].any(3).any(2))


CASES_A_CALL, LENGTH, BLOCK = 100, 72, 16


@pytest.fixture(scope="module")
def compiled_flex():
    """FlexAttention compiled for CPU: only compiled code reads the block table."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_flex_with_the_block_table_equals_the_reference(compiled_flex, seed: int) -> None:
    """2,000 random plans (20 batches of 100): FlexAttention that visits only the table's blocks misses nothing."""
    generator = torch.Generator().manual_seed(seed)
    plan = stacked([drawn_plan(generator, LENGTH) for _ in range(CASES_A_CALL)])
    q, k, v = qkv(CASES_A_CALL, 1, 1, LENGTH, 16, seed)
    with torch.no_grad():
        out = compiled_flex(q, k, v, block_mask=block_mask(plan, BLOCK))
    expected = sep_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)


def test_flex_backend_equals_the_reference_with_grouped_heads() -> None:
    """The flex backend, as users reach it: grouped heads, an odd length, a scale of its own."""
    plan = AttentionPattern(20, 2, (1,)).plan((torch.rand(2, 203) < 0.15).long())
    q, k, v = qkv(2, 4, 2, 203, 32)
    with torch.no_grad():
        out = sep_attention(q, k, v, plan, backend="flex", scale=0.3)
    torch.testing.assert_close(out, sep_attention(q, k, v, plan, backend="reference", scale=0.3), atol=2e-5, rtol=1e-5)


def test_every_backend_that_takes_a_span_gives_its_rows() -> None:
    """Each row of the registry and auto, with grouped heads: the rows of the whole plan's output."""
    plan = AttentionPattern(20, 2, (1,)).plan((torch.rand(2, 203) < 0.15).long())
    q, k, v = qkv(2, 4, 2, 203, 32)
    whole = sep_attention(q, k, v, plan)
    span = range(77, 180)
    part, own = q[:, :, span.start : span.stop], plan.of_queries(span)
    with torch.no_grad():
        for backend in ("auto", "reference", "flex", "triton"):
            out = sep_attention(part, k, v, own, backend=backend)
            torch.testing.assert_close(out, whole[:, :, span.start : span.stop], atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("nothing_chosen")
def test_auto_takes_the_reference_for_an_uneven_plan_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where auto takes the fused kernel for even plans and spans of them, as on CUDA; by name it refuses."""
    fused, *others = registry.OPERATIONS["sep_attention"].implementations
    eager = operation.Operation("sep_attention", (replace(fused, automatic=operation.always), *others))
    monkeypatch.setitem(registry.OPERATIONS, "sep_attention", eager)
    plan = AttentionPattern(4, 1).plan(torch.zeros(1, 24, dtype=torch.long))
    q, k, v = qkv(1, 2, 1, 24, 8)
    expected = sep_attention(q, k, v, plan)
    span = plan.of_queries(range(9, 24))
    for part in (span, replace(span, even=False)):
        torch.testing.assert_close(sep_attention(q[:, :, 9:], k, v, part), expected[:, :, 9:])
    with pytest.raises(BackendError, match=r"'triton' cannot run here: .* one window .*; or choose auto"):
        sep_attention(q[:, :, 9:], k, v, replace(span, even=False), backend="triton")
    assert capsys.readouterr().err == "sep_attention: triton on cpu\nsep_attention: reference on cpu\n"


def test_reference_is_softmax_over_the_visible_keys() -> None:
    """The reference equals softmax written out in double precision, outputs and gradients."""
    plan = AttentionPattern(3, 1, (1,)).plan((torch.rand(2, 17) < 0.2).long())
    q, k, v = (x.double().requires_grad_() for x in qkv(2, 2, 2, 17, 8))
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~plan.dense()[:, None], -torch.inf)
    expected = scores.softmax(-1) @ v
    out = sep_attention(q, k, v, plan)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for actual, wanted in zip(
        *(torch.autograd.grad((o * weights).sum(), (q, k, v)) for o in (out, expected)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_causal_plan_equals_a_window_as_long_as_the_row() -> None:
    """Vanilla attention takes torch's causal kernel and equals the masked reference; views need no copies."""
    ids = torch.zeros(2, 33, dtype=torch.long)
    plan = AttentionPattern().plan(ids)
    assert plan.causal
    q, k, v = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in qkv(2, 4, 2, 33, 16))
    masked = stacked([AttentionPattern(window=33).plan(ids)])
    torch.testing.assert_close(sep_attention(q, k, v, plan), sep_attention(q, k, v, masked))


@pytest.mark.usefixtures("no_compilations")
def test_the_front_door_compiles_without_a_graph_break() -> None:
    """torch.compile(fullgraph=True) takes the whole entry: masked, causal and for a span of the queries."""
    q, k, v = qkv(1, 2, 2, 24, 8)
    patterns = [AttentionPattern(window, 1) for window in (5, None)]
    whole = [pattern.plan(torch.zeros(1, 24, dtype=torch.long)) for pattern in patterns]
    for plan in (*whole, *(plan.of_queries(range(3, 24)) for plan in whole)):
        q = qkv(1, 2, 2, plan.num_queries, 8, seed=1)[0]
        run = torch.compile(
            lambda q, k, v, plan=plan: sep_attention(q, k, v, plan), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(run(q, k, v), sep_attention(q, k, v, plan))


@pytest.mark.usefixtures("no_compilations")
def test_compiled_it_takes_sizes_that_change() -> None:
    """Other rows, lengths, scales and head sizes, with and without gradients: never a break, never another result."""
    torch._dynamo.reset()
    run = torch.compile(sep_attention, fullgraph=True, backend="aot_eager")
    for batch, length, size, scale in ((1, 24, 8, None), (2, 24, 8, 0.3), (2, 31, 8, 0.4), (3, 31, 16, 0.5)):
        plan = AttentionPattern(5, 1).plan(torch.zeros(batch, length, dtype=torch.long))
        q, k, v = qkv(batch, 4, 2, length, size)
        for tensors in ((q, k, v), (q.requires_grad_(), k, v)):
            torch.testing.assert_close(run(*tensors, plan, scale=scale), sep_attention(*tensors, plan, scale=scale))


def test_reference_dropout_keeps_the_mean_and_others_refuse_it() -> None:
    """Dropout exists in the reference alone; elsewhere it is an error that says where it exists."""
    torch.manual_seed(0)
    plan = AttentionPattern(4).plan(torch.zeros(64, 16, dtype=torch.long))
    q, k, v = qkv(64, 8, 8, 16, 8)
    dropped = sep_attention(q, k, v.abs(), plan, dropout=0.3)
    kept = sep_attention(q, k, v.abs(), plan)
    assert not torch.allclose(dropped, kept)
    assert dropped.mean().item() == pytest.approx(kept.mean().item(), rel=0.02)
    for backend in ("flex", "triton"):
        with pytest.raises(BackendError, match=rf"'{backend}' cannot run here: it has no dropout.*takes 'reference'"):
            sep_attention(q, k, v, plan, backend=backend, dropout=0.1)


@pytest.mark.usefixtures("nothing_chosen")
def test_auto_says_its_choice_once(capsys: pytest.CaptureFixture[str]) -> None:
    """``auto`` prints what it took the first time and is silent after; on CPU it takes the reference."""
    plan = AttentionPattern(4).plan(torch.zeros(1, 16, dtype=torch.long))
    for _ in range(2):
        sep_attention(*qkv(1, 1, 1, 16, 8), plan)
    assert capsys.readouterr().err == "sep_attention: reference on cpu\n"


@pytest.mark.usefixtures("nothing_chosen")
def test_a_backend_that_is_unknown_or_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback: the error names the backend, the reason and the way out."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = AttentionPattern(4).plan(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(BackendError, match=r"fast.*reference"):
        sep_attention(*qkv(1, 1, 1, 16, 8), plan, backend="fast")
    with pytest.raises(BackendError, match=r"triton.*cpu.*auto"):
        sep_attention(*qkv(1, 1, 1, 16, 8), plan, backend="triton")


def test_shapes_that_do_not_fit_are_errors() -> None:
    """Head counts, lengths and plans that do not fit are named."""
    plan = AttentionPattern(4).plan(torch.zeros(1, 16, dtype=torch.long))
    q, k, v = qkv(1, 4, 3, 16, 8)
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3"):
        sep_attention(q, k, v, plan)
    with pytest.raises(ValueError, match="do not fit"):
        sep_attention(q, k[:, :, :5], v, plan)
    with pytest.raises(ValueError, match=r"16 queries of \[B, T\] = \(1, 16\) keys, got 12 queries of \(1, 16\)"):
        sep_attention(q[:, :3, :12], k, v, plan)
    with pytest.raises(ValueError, match=r"\(1, 16\)"):
        sep_attention(*qkv(1, 1, 1, 12, 8), plan)


@pytest.mark.usefixtures("no_compilations")
def test_shapes_may_be_symbols_of_a_graph() -> None:
    """One compilation of dynamic shapes, grouped heads or not, computes what the plain call does."""
    compiled = torch.compile(sep_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for pattern in (AttentionPattern(4), AttentionPattern()):
        for heads, kv_heads, length in ((4, 2, 16), (6, 3, 24), (2, 2, 32)):
            plan = pattern.plan(torch.zeros(1, length, dtype=torch.long))
            tensors = qkv(1, heads, kv_heads, length, 8)
            torch.testing.assert_close(compiled(*tensors, plan), sep_attention(*tensors, plan))

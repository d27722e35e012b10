"""ALiBi and the self-adjusting softmax against brute force, in every implementation that claims them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import full_run
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.config.position import SelfAdjustingConfig
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.scores import DistanceBias, alibi_slopes

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CASES = 200 if full_run() else 8
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# with next to no bias of the denominator, a query of a single key divides by its score, however small that is
DENOMINATOR = SelfAdjustingConfig(numerator_bias=0.3, denominator_bias=0.5)
PRODUCT = SelfAdjustingConfig(denominator=False)


class Case:
    """Queries, keys, values, a plan and a bias, drawn from one seed."""

    def __init__(self, seed: int, least: int = 1, size: int = 16) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.batch, self.keys, self.length = 1 + self.below(2), 1 + self.below(2), least + self.below(40)
        self.heads = self.keys * (1 + self.below(3))
        shape = (self.length, size)
        shapes = [(self.batch, heads, *shape) for heads in (self.heads, self.keys, self.keys, self.heads)]
        self.tensors = [torch.randn(s, generator=self.generator).to(DEVICE) for s in shapes]
        self.plan = self._plan()
        steps = torch.rand(self.batch, self.length, generator=self.generator) < 0.3
        counted = steps.cumsum(1).int().to(DEVICE)
        self.bias = DistanceBias(alibi_slopes(self.heads).to(DEVICE), counted if self.below(2) else None)

    def below(self, high: int) -> int:
        return int(torch.randint(0, high, (1,), generator=self.generator))

    def _plan(self) -> MaskPlan:
        window = None if self.below(5) == 0 else 1 + self.below(self.length)
        ids = (torch.rand(self.batch, self.length, generator=self.generator) < 0.2).long()
        document = (torch.rand(self.batch, self.length, generator=self.generator) < 0.05).cumsum(1)
        document = document.to(DEVICE) if self.below(2) else None
        return AttentionPattern(window, self.below(4), (1,)).plan(ids.to(DEVICE), document)


def by_brute_force(
    case: Case, plan: MaskPlan, bias: DistanceBias | None, adjusting: SelfAdjustingConfig | None, q: Tensor, k: Tensor,
    v: Tensor,
) -> Tensor:  # fmt: skip
    """One head after another, in double precision, from the formulae alone."""
    dense, out = plan.dense(), []
    stand = torch.arange(case.length, device=q.device).expand(case.batch, -1)
    stand = stand if bias is None or bias.position_BT is None else bias.position_BT
    for b in range(case.batch):
        for h in range(case.heads):
            g = h // (case.heads // case.keys)
            s = q[b, h] @ k[b, g].T / math.sqrt(q.shape[3])
            if bias is not None:
                s = s - float(bias.slopes_H[h]) * (stand[b][:, None] - stand[b])
            out.append(shares(s, dense[b], adjusting) @ v[b, g])
    return torch.stack(out).view(q.shape)


def shares(s: Tensor, seen: Tensor, adjusting: SelfAdjustingConfig | None) -> Tensor:
    """Of all queries of a head: nothing is shifted by a maximum, and unseen keys are infinitely far off."""
    weight = torch.where(seen, s, 0).exp() * seen
    p = weight / weight.sum(1, keepdim=True)
    if adjusting is None:
        return p
    if not adjusting.denominator:
        return p * torch.where(seen, s, 0)
    low = torch.where(seen, s, torch.inf).min(1, keepdim=True).values
    high = torch.where(seen, s, -torch.inf).max(1, keepdim=True).values
    low, high = torch.where(low < 0, low, 0), torch.where(high > 0, high, 0) + adjusting.denominator_bias
    return p * (torch.where(seen, s, 0) - low + adjusting.numerator_bias) / (high - low)


def with_gradients(attention: Any, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))]


def expected_of(case: Case, bias: DistanceBias | None, adjusting: SelfAdjustingConfig | None) -> list[Tensor]:
    """In double precision."""
    return with_gradients(
        lambda q, k, v: by_brute_force(case, case.plan, bias, adjusting, q, k, v), [x.double() for x in case.tensors]
    )


def check(found: list[Tensor], expected: list[Tensor], what: object) -> None:
    for name, a, e in zip(("o", "dq", "dk", "dv"), found, expected, strict=False):
        torch.testing.assert_close(a.double(), e, **TOLERANCE, msg=lambda m, n=name: f"{n} of {what}: {m}")


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_slopes_of_a_power_of_two_are_a_geometric_series(heads: int) -> None:
    """The first and every following ratio is 2^(-8 / H)."""
    slopes = alibi_slopes(heads).double()
    torch.testing.assert_close(slopes, 2.0 ** (-8 * torch.arange(1, heads + 1) / heads).double(), rtol=1e-6, atol=0)


def test_slopes_of_other_numbers_of_heads_are_those_of_the_powers_around() -> None:
    """12 heads: the eight of 8, then the first, third, fifth and seventh of 16."""
    expected = [2.0**-h for h in range(1, 9)] + [2.0 ** -(h / 2) for h in (1, 3, 5, 7)]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(expected))


@pytest.mark.parametrize("adjusting", [None, DENOMINATOR, PRODUCT], ids=["plain", "denominator", "product"])
def test_the_reference_equals_brute_force(adjusting: SelfAdjustingConfig | None) -> None:
    """Outputs and gradients in fp32, any pattern, documents, groups, with and without ALiBi, by index or as told."""
    for seed in range(CASES // 2):
        case = Case(seed)
        bias = case.bias if seed % 3 else None
        found = with_gradients(
            lambda q, k, v, c=case, b=bias: sep_attention(
                q, k, v, c.plan, backend="reference", bias=b, adjusting=adjusting
            ),
            case.tensors,
        )
        check(found, expected_of(case, bias, adjusting), seed)


@pytest.mark.parametrize("backend", ["triton"])
def test_the_fused_kernel_with_a_bias_equals_brute_force(backend: str) -> None:
    """Outputs and gradients in fp32; where a window is as long as the row the front door takes another row."""
    for seed in range(CASES):
        case = Case(seed, size=32)
        found = with_gradients(
            lambda q, k, v, c=case: sep_attention(q, k, v, c.plan, backend=backend, bias=c.bias), case.tensors
        )
        check(found, expected_of(case, case.bias, None), seed)


def test_the_fused_kernel_takes_full_attention_with_a_bias() -> None:
    """A plan of plain causal attention, past the front door."""
    from megatron_sep.kernels.sep_attention.triton import triton_attention

    case = Case(3, least=40, size=32)
    case.plan = AttentionPattern().plan(torch.zeros(case.batch, case.length, dtype=torch.long, device=DEVICE))
    assert case.plan.causal
    found = with_gradients(lambda q, k, v: triton_attention(q, k, v, case.plan, 32**-0.5, bias=case.bias), case.tensors)
    check(found, expected_of(case, case.bias, None), "causal")


@pytest.mark.usefixtures("no_compilations")
def test_flex_with_a_bias_equals_brute_force() -> None:
    """On the CPU the outputs alone, as it has no backward pass there; grouped heads, a span of the queries too."""
    for seed in range(1, 21 if ON_GPU else 5 if full_run() else 2):
        case = Case(seed, least=20)
        with torch.no_grad():
            found = sep_attention(*case.tensors[:3], case.plan, backend="flex", bias=case.bias)
            expected = expected_of_output(case)
            check([found], [expected], seed)
            if not case.plan.causal:
                span = range(5, case.length - 3)
                q, k, v = case.tensors[:3]
                part = q[:, :, span.start : span.stop]
                found = sep_attention(part, k, v, case.plan.of_queries(span), backend="flex", bias=case.bias)
                check([found], [expected[:, :, span.start : span.stop]], seed)


def expected_of_output(case: Case) -> Tensor:
    return by_brute_force(case, case.plan, case.bias, None, *(x.double() for x in case.tensors[:3]))


def test_a_span_of_the_queries_gives_the_rows_of_the_whole() -> None:
    """The reference, with a bias and a self-adjusting softmax, in the middle of a row."""
    case = Case(5, least=30)
    span = range(7, 21)
    q, k, v = case.tensors[:3]
    settings: dict[str, Any] = {"bias": case.bias, "adjusting": DENOMINATOR, "backend": "reference"}
    whole = sep_attention(q, k, v, case.plan, **settings)
    part = sep_attention(q[:, :, span.start : span.stop], k, v, case.plan.of_queries(span), **settings)
    torch.testing.assert_close(part, whole[:, :, span.start : span.stop])


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_what_has_no_self_adjusting_softmax_says_so(backend: str) -> None:
    """No other result in silence."""
    case = Case(8, least=20, size=32)
    case.plan = AttentionPattern(4).plan(torch.zeros(case.batch, case.length, dtype=torch.long, device=DEVICE))
    with pytest.raises(BackendError, match=rf"'{backend}' cannot run here: it has no self-adjusting softmax.*'refer"):
        sep_attention(*case.tensors[:3], case.plan, backend=backend, adjusting=DENOMINATOR)


def test_a_bias_that_does_not_fit_is_an_error() -> None:
    """Slopes of other heads, positions of another row."""
    case = Case(2)
    q, k, v = case.tensors[:3]
    with pytest.raises(ValueError, match=f"slopes for 99 heads, the queries have {case.heads}"):
        sep_attention(q, k, v, case.plan, bias=DistanceBias(torch.ones(99, device=DEVICE)))
    stands = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"positions \(1, 2\) of the bias"):
        sep_attention(q, k, v, case.plan, bias=DistanceBias(case.bias.slopes_H, stands))


def test_a_bias_in_low_precision_is_that_of_fp32() -> None:
    """Distances that bf16 cannot tell apart still count: the reference adds in fp32."""
    q = torch.zeros(1, 1, 600, 16, dtype=torch.bfloat16)
    v = torch.arange(600.0)[None, None, :, None].expand(1, 1, 600, 16).to(torch.bfloat16)
    plan = AttentionPattern(599).plan(torch.zeros(1, 600, dtype=torch.long))
    bias = DistanceBias(torch.tensor([0.5]))
    found = sep_attention(q, q, v, plan, backend="reference", bias=bias)[0, 0, -1, 0]
    near = 0.5 * torch.arange(599.0).flip(0)
    expected = (-near).softmax(0) @ v[0, 0, 1:, 0].float()
    assert float(found) == pytest.approx(float(expected), rel=2**-8)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, s) for s in (32, 64, 80, 128, 256)] + [(torch.float32, 64)]
)
def test_random_cases_with_a_bias_equal_the_reference_on_gpu(dtype: torch.dtype, size: int) -> None:
    """Compiled: outputs and all gradients at lengths of several tiles, windows that have inner ones, packed or not."""
    for seed in range(40):
        case = Case(seed, least=200 + 40 * (seed % 8), size=size)
        tensors = [x.to(dtype) for x in case.tensors]

        def attention(q: Tensor, k: Tensor, v: Tensor, backend: str, case: Case = case) -> Tensor:
            return sep_attention(q, k, v, replace(case.plan, causal=False), backend=backend, bias=case.bias)

        expected = with_gradients(lambda q, k, v, a=attention: a(q, k, v, "reference"), [x.float() for x in tensors])
        found = with_gradients(lambda q, k, v, a=attention: a(q, k, v, "triton"), tensors)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-3
        for name, a, e in zip(("o", "dq", "dk", "dv"), found, expected, strict=True):
            error = float((a.float() - e).norm() / (e.norm() + e.numel() ** 0.5))
            assert error <= tolerance, (name, seed, error)

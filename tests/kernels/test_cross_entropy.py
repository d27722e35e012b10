"""The loss of each token: every row of the kernels against the formula in fp64."""

import pytest
import torch

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("row", ["triton", "torch", "reference"])
def test_rows_equal_the_formula(row: str, compiled: bool, dtype: torch.dtype, tolerance: float) -> None:
    """fp32 losses [B, T] and the logits' gradient, odd sizes, logits of any height, one of them masked out."""
    losses = OPERATIONS["cross_entropy"].resolve(Call.on(DEVICE, dtype, training=True), row)
    if compiled:
        losses = torch.compile(losses, dynamic=False, backend="inductor" if DEVICE.type == "cuda" else "aot_eager")
    generator = torch.Generator().manual_seed(0)
    for batch, length, vocab in ((1, 1, 1), (3, 7, 11), (2, 16, 513)):
        heights = torch.randint(-100, 100, (length, batch, 1), generator=generator)
        logits = (torch.randn(length, batch, vocab, generator=generator) * 3 + heights).to(DEVICE, dtype)
        labels = torch.randint(0, vocab, (batch, length), generator=generator).to(DEVICE)
        if vocab > 1:
            logits[0, 0, (labels[0, 0] + 1) % vocab] = -torch.inf
        weights = torch.rand(batch, length, generator=generator).to(DEVICE)
        logits.requires_grad_()
        found = losses(labels, logits)
        (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
        wide = logits.detach().double().requires_grad_()
        expected = -wide.log_softmax(2).transpose(0, 1).gather(2, labels[..., None])[..., 0]
        (wanted,) = torch.autograd.grad((expected * weights).sum(), wide)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient.double(), wanted, atol=tolerance, rtol=tolerance)


def test_a_label_outside_the_vocabulary_is_not_passed_over() -> None:
    """The fused row gives NaN for it, which no step applies, and the true loss for its neighbours."""
    losses = OPERATIONS["cross_entropy"].resolve(Call.on(DEVICE, torch.float32), "triton")
    logits = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = losses(torch.tensor([[7, 2, -100]], device=DEVICE), logits)
    assert found.isnan().tolist() == [[True, False, True]]
    torch.testing.assert_close(found[0, 1], -logits[1, 0].log_softmax(0)[2])


def test_the_gradient_lies_where_the_logits_lay_and_only_once() -> None:
    """The fused row takes no memory for it; a second backward pass is refused, and a leaf keeps its values."""
    losses = OPERATIONS["cross_entropy"].resolve(Call.on(DEVICE, torch.float32), "triton")
    leaf = torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 9, (2, 4), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    logits = leaf * 2
    logits.retain_grad()
    loss = losses(labels, logits).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(logits.grad, logits)
    with pytest.raises(RuntimeError, match="wrote the gradient over the logits"):
        loss.backward()
    for view in (leaf, leaf.view(8, 1, 9)):
        before = leaf.detach().clone()
        losses(labels.reshape(view.shape[1::-1]), view).sum().backward()
        assert torch.equal(leaf, before)


def test_a_vocabulary_in_parts_adds_up() -> None:
    """The fused row's sums over two parts, merged, give the loss of the whole, and each part its own gradient."""
    from megatron_sep.kernels.cross_entropy.triton import TokenLosses, logits_summary

    generator = torch.Generator().manual_seed(1)
    logits = (30 * torch.randn(5, 2, 24, generator=generator)).to(DEVICE).requires_grad_()
    labels = torch.randint(0, 24, (2, 5), generator=generator).to(DEVICE)
    parts = [part.contiguous() for part in logits.detach().split(12, 2)]
    summaries = torch.stack([torch.stack(logits_summary(p, labels, 12 * i, 24)) for i, p in enumerate(parts)])
    largest = summaries[:, 0].amax(0)
    total = (summaries[:, 1] * (summaries[:, 0] - largest).exp()).sum(0)
    merged = (largest, total, summaries[:, 2].sum(0))
    expected = -logits.log_softmax(2).transpose(0, 1).gather(2, labels[..., None])[..., 0]
    weights = torch.rand(2, 5, generator=generator).to(DEVICE)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    for rank, part in enumerate(parts):
        part.requires_grad_()
        found = TokenLosses.apply(part, labels, 12 * rank, 24, lambda _summary: merged)
        torch.testing.assert_close(found, expected)
        (share,) = torch.autograd.grad((found * weights).sum(), part)
        torch.testing.assert_close(share, gradient[..., 12 * rank : 12 * rank + 12], atol=1e-6, rtol=1e-5)

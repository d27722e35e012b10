"""The loss of each token: every row of the kernels against the formula in fp64."""

import pytest
import torch

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("row", ["torch", "reference"])
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

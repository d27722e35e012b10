"""A model is computed by the operations that were resolved when it was built."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megatron_sep.attention.layers import layer_patterns, plan_layers
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import ModelConfig
from megatron_sep.kernels import operation, registry, why_not
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.norm import reference
from megatron_sep.kernels.operation import BackendError, Implementation, never
from megatron_sep.model.operations import resolve
from megatron_sep.parallel.device import current_device
from megatron_sep.parallel.groups import topology

pytestmark = pytest.mark.usefixtures("single_process")

VOCAB, LENGTH = 64, 24
CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=2, sequence_length=LENGTH)


def built(config: ModelConfig = CONFIG, **settings: object) -> nn.Module:
    from megatron_sep.model.build import build_model

    model: nn.Module = build_model(config, topology(), vocab_size=VOCAB, precision="fp32", seed=1, **settings)
    return model


def losses(model: nn.Module) -> Tensor:
    """Of each token of two rows, the first layer full, the second Sep; gradients are left on the parameters."""
    ids = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(current_device())
    plans = plan_layers(layer_patterns(AttentionPattern(4, 1, (5, 9)), 2, (0,)), ids)
    found: Tensor = model(ids, torch.arange(LENGTH, device=ids.device)[None], plans, labels=ids.roll(-1, 1))
    found.mean().backward()
    return found.detach()


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    """Losses and every gradient."""
    torch.testing.assert_close(losses(model), losses(expected), atol=1e-5, rtol=1e-5)
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=partial("{}: {}".format, name))


REFERENCES = {"layernorm": "reference", "rmsnorm": "reference", "cross_entropy": "reference"}


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_norm_that_is_named_computes_where_a_branch_leaves_the_stream(norm: str) -> None:
    """On a GPU a fused row would take its place: auto leaves it to the named norm, a named one is refused."""
    from megatron_sep.kernels.norm import residual, triton

    call = Call("cuda", torch.bfloat16, (9, 0), head_size=64, training=True)
    assert resolve(call, norm, {}).open_residual is triton.open_residual
    assert resolve(call, norm, {norm: "triton"}).open_residual is triton.open_residual
    assert resolve(call, norm, {norm: "torch"}).open_residual is residual.open_residual
    with pytest.raises(BackendError, match=f"open_residual=triton computes the norms itself, so {norm}=torch would"):
        resolve(call, norm, {norm: "torch", "open_residual": "triton"})


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_model_of_references_computes_the_same(norm: str) -> None:
    """Every operation by its plain reference: the losses and gradients of the model that auto makes."""
    config = CONFIG.model_copy(update={"norm": norm})
    plain = built(config, backend="reference", other_backends=REFERENCES | {"full_attention": "reference"})
    kind = {"layernorm": reference.LayerNorm, "rmsnorm": reference.RMSNorm}[norm]
    assert sum(isinstance(module, kind) for module in plain.modules()) == 5
    check_equal(plain, built(config))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("row", ["torch", "triton"])
def test_a_loss_by_chunks_is_the_loss(row: str, tied: bool) -> None:
    """Chunks that do not divide the tokens, down to one position at a time: losses and every gradient; logits too."""
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    for chunk in (1, 20):
        chunked = built(config, loss_chunk=chunk, other_backends={"cross_entropy": row})
        check_equal(chunked, built(config))


class ToyNorm(nn.Module):
    """x * weight."""

    def __init__(self, size: int, _eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_new_norm_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has it in every place, marked for megatron-core, and learns through it."""
    row = Implementation("toy", f"{__name__}:ToyNorm", why_not.nothing, never, "tests/model/test_operations.py", "")
    monkeypatch.setitem(registry.OPERATIONS, "layernorm", registry.OPERATIONS["layernorm"].with_rows(row))
    model = built(other_backends={"layernorm": "toy"})
    norms = {name: module for name, module in model.named_modules() if isinstance(module, ToyNorm)}
    assert len(norms) == 5
    losses(model)
    for name, norm in norms.items():
        assert norm.weight.sequence_parallel is False, name
        assert norm.weight.grad.count_nonzero() > 0, name


@pytest.mark.parametrize("row", ["megatron", "megatron_fused", "triton_split"])
@pytest.mark.parametrize("compiled", [False, True])
def test_losses_of_a_split_vocabulary_equal_the_reference(row: str, compiled: bool) -> None:
    """On a vocabulary that one rank holds: losses to fp32, the fused row's gradient to bf16, which it rounds to."""
    from megatron_sep.model.operations import SPLIT_VOCABULARY

    compute: Callable[[Tensor, Tensor], Tensor] = {r.name: r for r in SPLIT_VOCABULARY}[row].load()
    if compiled:  # a decoder compiles whatever loss it is given
        compute = torch.compile(compute, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCAB, (3, 5), generator=generator).to(current_device())
    logits = torch.randn(5, 3, VOCAB, generator=generator).to(current_device())
    found, expected = (
        loss_and_gradient(losses, labels, logits)
        for losses in (compute, registry.OPERATIONS["cross_entropy"].resolve(Call("cpu", torch.float32), "reference"))
    )
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    tolerance = 4e-3 if row == "megatron_fused" else 1e-5
    torch.testing.assert_close(found[1].float(), expected[1], atol=tolerance, rtol=tolerance)


def loss_and_gradient(
    losses: Callable[[Tensor, Tensor], Tensor], labels_BT: Tensor, logits_TBV: Tensor
) -> tuple[Tensor, Tensor]:
    """Of fresh logits, which megatron-core overwrites."""
    logits = logits_TBV.clone().requires_grad_()
    found = losses(labels_BT, logits * 1)
    found.sum().backward()
    return found.detach(), logits.grad


def test_what_cannot_run_is_refused_when_the_model_is_built() -> None:
    """Before any weight is made, with the reason of the row that was asked for."""
    dropping = CONFIG.model_copy(update={"attention_dropout": 0.1})
    with pytest.raises(BackendError, match=r"'triton' cannot run here: it has no dropout.*takes 'reference'"):
        built(dropping, backend="triton")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match=r"'flex' cannot run here: FlexAttention has no backward pass on the C"):
            built(backend="flex")
    with pytest.raises(BackendError, match="there is no operation nrom; name some of sep_attention, full_attention"):
        built(other_backends={"nrom": "torch"})
    with pytest.raises(TypeError, match="sep_attention"):
        built(other_backends={"sep_attention": "reference"})


def test_dropout_takes_what_has_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """auto with dropout: a row that has it, on any device; the model trains, and each choice is printed once."""
    monkeypatch.setattr(operation, "_announced", set())
    config = CONFIG.model_copy(update={"attention_dropout": 0.3})
    dropped, kept = losses(built(config)), losses(built())
    assert not torch.allclose(dropped, kept)
    device = current_device().type
    said = capsys.readouterr().err.splitlines()
    chosen = ("full_attention: torch", "sep_attention: reference", "layernorm: torch", "open_residual: reference")
    chosen += ("split_rotated: reference", "bias_gelu: torch", "cross_entropy: torch", "adamw: torch")
    assert said[:8] == [f"{line} on {device}" for line in chosen]

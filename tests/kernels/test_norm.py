"""LayerNorm and RMSNorm: every row that can run here against the formula in fp32 and wider."""

import pytest
import torch
from support.fakes import installed
from torch import Tensor, nn

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.norm import OpenResidual
from megatron_sep.kernels.registry import OPERATIONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMS = ["layernorm", "rmsnorm"]
ROWS = ["triton", "torch", "transformer_engine", "apex", "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def made(name: str, row: str, size: int, dtype: torch.dtype) -> nn.Module:
    """A norm with random parameters, the same for every row."""
    norm: nn.Module = OPERATIONS[name].resolve(Call.on(DEVICE, dtype, training=True), row)(size, 1e-3, dtype)
    generator = torch.Generator().manual_seed(size)
    for _, parameter in sorted(norm.named_parameters(), reverse=True):  # the weight first
        parameter.data.copy_(torch.randn(size, generator=generator))
    return norm.to(DEVICE)


def results(norm: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    out = norm(x)
    out.backward(gradient.to(out.dtype))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in norm.named_parameters()}}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", NORMS)
def test_rows_equal_the_reference_in_fp64(name: str, row: str, dtype: torch.dtype) -> None:
    """Outputs and all gradients; odd sizes, strided rows, means off 0, rows from small to large."""
    reason = {r.name: r for r in OPERATIONS[name].implementations}[row].why_not(Call.on(DEVICE, dtype, training=True))
    if reason is not None:
        pytest.skip(reason)
    for size in (2, 7, 64, 193):
        generator = torch.Generator().manual_seed(size)
        x, gradient = torch.randn(2, 5, 3, 2 * size, generator=generator).to(DEVICE, dtype)[..., ::2]
        x = (x + 0.5) * torch.tensor([0.01, 0.1, 1, 3, 30], device=DEVICE, dtype=dtype)[:, None, None]
        norm = made(name, row, size, dtype)
        wide = made(name, "reference", size, torch.float64)
        wide.load_state_dict(norm.state_dict())
        expected = results(wide, x.double(), gradient.double())
        found = results(norm, x, gradient)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            error = (found[key].double() - value).norm() / (value.norm() + value.numel() ** 0.5)
            assert error <= TOLERANCE[dtype], (size, key, error)
            assert found[key].dtype == dtype, key


@pytest.mark.parametrize("row", ["transformer_engine", "apex"])
@pytest.mark.parametrize("name", NORMS)
def test_rows_of_packages_ask_them_for_the_same_norm(name: str, row: str) -> None:
    """Found where they are installed: size, epsilon and type arrive, and the parameters have the names of torch's."""
    call = Call("cuda", torch.bfloat16, (9, 0))
    with installed(row):
        norm = OPERATIONS[name].resolve(call, row)(24, 1e-3, torch.bfloat16)
        assert OPERATIONS[name].choose(call).name == "triton"
    assert type(norm).__module__.split(".")[0] == row
    expected = made(name, "torch", 24, torch.bfloat16).state_dict()
    assert {key: (value.shape, value.dtype) for key, value in norm.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    assert norm.eps == 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("row", ["triton", "reference"])
@pytest.mark.parametrize("name", NORMS)
def test_an_open_residual_equals_its_norms_and_sums(
    name: str, row: str, norms: int, biases: int, dtype: torch.dtype
) -> None:
    """Outputs, the stream with its biases, and all gradients, the stream's included, against plain calls in fp64."""
    size = 70
    generator = torch.Generator().manual_seed(norms)
    x, *gradients = torch.randn(2 + norms, 5, 3, size, generator=generator).to(DEVICE, dtype)
    added = list(torch.randn(2, size, generator=generator).to(DEVICE, dtype))[:biases]
    table = OPERATIONS["open_residual"]
    modules = [made(name, "torch", size, dtype) for _ in range(norms)]
    wide = [made(name, "reference", size, torch.float64) for _ in range(norms)]
    for module, exact in zip(modules, wide, strict=True):
        exact.load_state_dict(module.state_dict())
    found = opened(table.resolve(Call.on(DEVICE, dtype), row), x, modules, added, gradients)
    exact_row = table.resolve(Call("cpu", torch.float64), "reference")
    doubled = [[given.double() for given in group] for group in (added, gradients)]
    expected = opened(exact_row, x.double(), wide, *doubled)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = (found[key].double() - value).norm() / (value.norm() + value.numel() ** 0.5)
        assert error <= TOLERANCE[dtype], (key, error)


def opened(
    compute: OpenResidual, x: Tensor, norms: list[nn.Module], biases: list[Tensor], gradients: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    x, *biases = (given.detach().requires_grad_() for given in (x, *biases))
    outputs, stream = compute(x, norms, biases)
    torch.autograd.backward([*outputs, stream], gradients)
    named = {f"norm {i}": output.detach() for i, output in enumerate(outputs)} | {
        "stream": stream.detach(),
        "x": x.grad,
    }
    named |= {f"added {i}": bias.grad for i, bias in enumerate(biases)}
    return named | {f"{name} {i}": p.grad for i, norm in enumerate(norms) for name, p in norm.named_parameters()}


def test_fused_sums_are_the_same_bits_every_time() -> None:
    """Two backward passes over more rows than a program takes; the biases' gradients are tensors of their own."""
    compute = OPERATIONS["open_residual"].resolve(Call.on(DEVICE, torch.float32), "triton")
    generator = torch.Generator().manual_seed(0)
    x, *gradients = torch.randn(4, 300, 24, generator=generator).to(DEVICE)
    biases = list(torch.randn(2, 24, generator=generator).to(DEVICE))
    first, second = (
        opened(compute, x, [made("layernorm", "triton", 24, torch.float32) for _ in range(2)], biases, gradients)
        for _ in range(2)
    )
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    assert torch.equal(first["added 0"], first["added 1"])
    assert first["added 0"].data_ptr() != first["added 1"].data_ptr()

"""AdamW in one pass: each value is read once, clipped, stepped, written, and rounded to the weight that computes.

All parameters of a group are one launch: a table holds where they lie, so nothing has to be copied together first.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, optim

from megatron_sep.kernels.adamw import AdamW, step_and_moments

_BLOCK, _WARPS = 2048, 4
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _step_kernel(
    PLACES, SIZES, CHUNKS, CORRECTIONS, SCALE, FOUND_INF, tensors, lr, decay, eps,
    BETA1: tl.constexpr, BETA2: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PLACES int64 [5, tensors]: addresses of values, gradients, first and second moments, and weights. CORRECTIONS
    fp32 [2, tensors]: 1 - beta^step of each moment."""
    which = tl.load(CHUNKS + 2 * tl.program_id(0))
    i = tl.load(CHUNKS + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    size = tl.load(SIZES + which)
    if FOUND_INF is not None:
        size = tl.where(tl.load(FOUND_INF) == 0, size, 0)
    there = i < size
    PLACES += which
    fp32: tl.constexpr = tl.pointer_type(tl.float32)
    P = tl.multiple_of(tl.load(PLACES), 16).to(fp32) + i
    G = tl.multiple_of(tl.load(PLACES + tensors), 16).to(fp32) + i
    M = tl.multiple_of(tl.load(PLACES + 2 * tensors), 16).to(fp32) + i
    V = tl.multiple_of(tl.load(PLACES + 3 * tensors), 16).to(fp32) + i
    correction1 = tl.load(CORRECTIONS + which)
    correction2 = tl.load(CORRECTIONS + tensors + which)

    g = tl.load(G, mask=there, other=0.0)
    if SCALE is not None:
        g = g / tl.load(SCALE)
    p = tl.load(P, mask=there, other=0.0)
    m = tl.load(M, mask=there, other=0.0)
    v = tl.load(V, mask=there, other=0.0)
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    p = p * (1 - lr * decay) - lr / correction1 * m / (tl.sqrt(v / correction2) + eps)
    tl.store(P, p, mask=there)
    tl.store(M, m, mask=there)
    tl.store(V, v, mask=there)
    if ROUNDED is not None:
        W = tl.multiple_of(tl.load(PLACES + 4 * tensors), 16).to(tl.pointer_type(ROUNDED)) + i
        tl.store(W, p.to(ROUNDED), mask=there)


@dataclass(frozen=True)
class _Table:
    """Where the tensors of a group lie, on the host and on the device."""

    addresses: tuple[int, ...]
    places: Tensor
    sizes: Tensor
    chunks: Tensor
    betas_21: Tensor

    @classmethod
    def of(
        cls, addresses: tuple[int, ...], sizes: list[int], betas: tuple[float, float], device: torch.device
    ) -> "_Table":
        chunks = [(n, start) for n, size in enumerate(sizes) for start in range(0, size, _BLOCK)]
        return cls(
            addresses,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.tensor(sizes, dtype=torch.int64, device=device),
            torch.tensor(chunks, dtype=torch.int64, device=device),
            torch.tensor(betas, dtype=torch.float64, device=device)[:, None],
        )

    def corrections(self, steps: list[Tensor]) -> Tensor:
        """1 - beta^step of the step that comes, of each moment and tensor: fp32 [2, N]."""
        return (1 - self.betas_21 ** (torch.stack(steps).double() + 1)).float()


class OnePassAdamW(optim.AdamW):
    """torch's class and state, with a step of its own. Parameters and gradients are contiguous and fp32."""

    rounded: dict[Tensor, Tensor]
    """Of each parameter the 16-bit weight that a step writes too; none where it is not given."""

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("OnePassAdamW.step takes no closure; compute the gradients before it")
        for number, group in enumerate(self.param_groups):
            parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
            if parameters:
                self._step(number, group, parameters)

    def _step(self, number, group, parameters):
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rounded = getattr(self, "rounded", {})
        weights = [rounded[p] for p in parameters] if rounded else []
        columns = [parameters, [p.grad for p in parameters]]
        columns += [[self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
        steps = [self.state[p]["step"] for p in parameters]
        table = self._table(number, [*columns, weights or parameters], group["betas"])
        _step_kernel[(len(table.chunks),)](
            table.places, table.sizes, table.chunks, table.corrections(steps), scale, found_inf,
            len(parameters), group["lr"], group["weight_decay"], group["eps"],
            BETA1=group["betas"][0], BETA2=group["betas"][1],
            ROUNDED=_TYPES[weights[0].dtype] if weights else None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        torch._foreach_add_(steps, 1)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))

    def _table(self, number, columns, betas):
        """The table of a group, made anew only where a tensor lies elsewhere than in the step before."""
        addresses = tuple(tensor.data_ptr() for column in columns for tensor in column)
        tables = self.__dict__.setdefault("tables", {})
        if number not in tables or tables[number].addresses != addresses:
            _check(columns)
            tables[number] = _Table.of(addresses, [p.numel() for p in columns[0]], betas, columns[0][0].device)
        return tables[number]


def _check(columns):
    """Raises ValueError for tensors that the kernel would read wrongly."""
    for values, *others, weight in zip(*columns, strict=True):
        for tensor in (values, *others, weight):
            if tensor.numel() != values.numel() or not tensor.is_contiguous() or tensor.data_ptr() % 16:
                raise ValueError(f"AdamW: {tuple(tensor.shape)} at {tensor.data_ptr()} is not contiguous and aligned")
        if any(tensor.dtype != torch.float32 for tensor in (values, *others)):
            raise ValueError(f"AdamW: parameters, gradients and moments are fp32, not {[t.dtype for t in others]}")


ADAMW = AdamW("torch", OnePassAdamW, {}, step_and_moments, skips_by_itself=True, rounds=True)

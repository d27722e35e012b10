"""The second stage of a sum over rows, and how many programs take part in the first."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS, _PARTS = 16, 256
_CPU_PROGRAMS = 3
"""In the interpreter: more than one, so that the second stage is put to the test."""


@triton.jit(do_not_specialize=["parts"])
def _column_sums(PARTS, OUT, parts, columns, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """OUT[v, c] = the sum over p of PARTS[v, p, c]."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    p = tl.arange(0, BLOCK)
    v = tl.program_id(1)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for first in tl.range(0, parts, BLOCK):
        there = (first + p < parts)[:, None] & (c < columns)[None, :]
        total += tl.load(PARTS + (v * parts + first + p)[:, None] * columns + c[None, :], mask=there, other=0.0)
    tl.store(OUT + v * columns + c, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=c < columns)


def column_sums(parts_VPC: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over P of each of V fp32 matrices: [V, C] of ``dtype``."""
    vectors, parts, columns = parts_VPC.shape
    out = parts_VPC.new_empty((vectors, columns), dtype=dtype)
    _column_sums[(triton.cdiv(columns, _COLUMNS), vectors)](
        parts_VPC, out, parts, columns, BLOCK=_PARTS, COLUMNS=_COLUMNS, num_warps=4
    )
    return out


def num_programs(device: torch.device, a_multiprocessor: int, blocks: int, across: int = 1) -> int:
    """Of the first stage, for one block of columns of ``across``: at most one for each of ``blocks`` of rows."""
    if device.type != "cuda":
        return min(_CPU_PROGRAMS, blocks)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(min(multiprocessors * a_multiprocessor // across, blocks), 1)

"""One decode step of attention over a cache of keys and values that live in preallocated slots, in place.

Names: B rows of the batch, H query heads in groups that share one of K key heads, D head size, C slots,
L layers. R rows of bookkeeping: R = B where all heads keep the same tokens, R = B * K (b-major) where each key head
keeps its own. Slots ``[0, length)`` of a row are in use; slot c is dead once ``reach_end[c] <= now``, its memory stays
until ``compact``.
"""

import operator
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.registry import function_for
from megatron_sep.kernels.why_not import dependent_launches

Rotary: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin, fp32 [C or more, N/2]: the angles of the first N <= D dimensions at an index; rotate-half pairs."""


@torch.no_grad()
def decode_attention(
    q_BHD: Tensor,
    k_new_BKD: Tensor,
    v_new_BKD: Tensor,
    k_BKCD: Tensor,
    v_BKCD: Tensor,
    length_R: Tensor,
    reach_end_RC: Tensor,
    now_R: Tensor,
    *,
    scale: float,
    rotary: Rotary | None = None,
    arrived_BK: Tensor | None = None,
    dependent: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Store the new token in slot ``length`` of each row, then attend to it and to the live slots before it: [B, H, D].

    The caches are written in place and may be views of any strides with a contiguous last axis. ``length``,
    ``reach_end`` and ``now`` are int32 on the tensors' device and only read: the caller advances ``length`` once all
    layers are through. The new token counts whatever its ``reach_end`` says. ``length < C`` is the caller's promise: in
    a full row the kernel stores nothing (and never writes outside), the reference raises.

    ``scale`` multiplies the scores. ``rotary``: keys are stored unrotated, and slot c turns by the angle of index c as
    it is read; the query comes unrotated and turns by the angle of its own slot, ``length`` (positions inside the
    cache). None: queries and keys are used as they are.

    ``arrived``: int32 zeros, and zeros again afterwards. Where the kernel shares a head's slots among programs it
    counts here those that are ready, so that the last can finish the output. Steps that may run at once, those of two
    caches, each need their own. None: a second kernel finishes.

    ``dependent``: the kernel is launched while the one before it in the stream still ends, and lets the next one be
    launched so; it waits for that end before it reads or writes. The reference, which launches none, has no use for it.

    ``backend``: "auto" (Triton on CUDA where it can, else the reference), "triton" or "reference". The kernel never
    waits for the host and its launch depends on shapes alone, so a CUDA graph can hold it. No gradient flows. Raises
    ValueError for what does not fit, BackendError for a backend or launches that cannot be.
    """
    _check_caches("k [B, K, C, D] and v", k_BKCD, v_BKCD, 4)
    _check_step(q_BHD, k_new_BKD, v_new_BKD, k_BKCD)
    _check_rows(k_BKCD.shape, k_BKCD.device, {"length": length_R, "now": now_R}, {"reach_end": reach_end_RC})
    if rotary is not None:
        _check_rotary(rotary, k_BKCD)
    if arrived_BK is not None:
        _check_arrived(arrived_BK, k_BKCD)
    if dependent:
        _check_dependent(q_BHD)
    slots = (k_BKCD, v_BKCD, length_R, reach_end_RC, now_R)
    arguments = (q_BHD, k_new_BKD, v_new_BKD, *slots, scale, rotary, arrived_BK, dependent)
    decode = function_for("sep_decode", backend, q_BHD.device, q_BHD.dtype, head_size=operator.index(q_BHD.shape[2]))
    out: Tensor = decode(*arguments)
    return out


@torch.no_grad()
def compact(
    k_LBKCD: Tensor,
    v_LBKCD: Tensor,
    source_RC: Tensor,
    new_length_R: Tensor,
    due_R: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """In the rows that are due, slot i < ``new_length`` takes what slot ``source[i]`` holds, in all layers, in place.

    ``source`` (int32) ascends strictly, so ``source[i] >= i``; what it holds from ``new_length`` (int32) on is not
    used. ``due`` is bool or int8. Slots from ``new_length`` on keep what they held. Backends and errors are those of
    ``decode_attention``; nothing waits for the host.
    """
    _check_caches("k [L, B, K, C, D] and v", k_LBKCD, v_LBKCD, 5)
    _check_rows(k_LBKCD.shape[1:], k_LBKCD.device, {"new_length": new_length_R}, {"source": source_RC})
    if due_R.shape != new_length_R.shape or due_R.dtype not in (torch.bool, torch.int8):
        raise ValueError(
            f"sep_decode: due is {tuple(due_R.shape)} of {due_R.dtype}; "
            f"pass {tuple(new_length_R.shape)} of bool or int8"
        )
    if due_R.device != k_LBKCD.device:
        raise ValueError(f"sep_decode: due is on {due_R.device}, the caches on {k_LBKCD.device}; move it there")
    move = function_for(
        "sep_compact", backend, k_LBKCD.device, k_LBKCD.dtype, head_size=operator.index(k_LBKCD.shape[4])
    )
    move(k_LBKCD, v_LBKCD, source_RC, new_length_R, due_R)


def _check_caches(names: str, k: Tensor, v: Tensor, axes: int) -> None:
    if k.dim() != axes or k.shape != v.shape or k.dtype != v.dtype or k.device != v.device:
        raise ValueError(
            f"sep_decode: {names} must be two caches alike, got {tuple(k.shape)} of {k.dtype} on {k.device} and "
            f"{tuple(v.shape)} of {v.dtype} on {v.device}"
        )
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        raise ValueError(
            f"sep_decode: the last axis of the caches has strides {k.stride(-1)} and {v.stride(-1)}; they are written "
            "in place, so allocate them with D last"
        )


def _check_step(q: Tensor, k_new: Tensor, v_new: Tensor, k: Tensor) -> None:
    B, K, C, D = k.shape
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (B, D) or k_new.shape != (B, K, D) or v_new.shape != (B, K, D):
        raise ValueError(
            f"sep_decode: a cache [B, K, C, D] = {(B, K, C, D)} takes q [B, H, D] and new keys and values [B, K, D], "
            f"got {tuple(q.shape)}, {tuple(k_new.shape)}, {tuple(v_new.shape)}"
        )
    if K == 0 or q.shape[1] == 0 or q.shape[1] % K:
        raise ValueError(f"sep_decode: {q.shape[1]} query heads are no multiple of {K} key heads")
    if C == 0:
        raise ValueError("sep_decode: the cache has no slots; allocate at least one")
    for name, x in (("q", q), ("k_new", k_new), ("v_new", v_new)):
        if x.dtype != k.dtype or x.device != k.device:
            raise ValueError(
                f"sep_decode: {name} is {x.dtype} on {x.device}, the caches are {k.dtype} on {k.device}; "
                "convert it or allocate the caches like it"
            )


def _check_rows(
    shape: torch.Size, device: torch.device, numbers: dict[str, Tensor], slots: dict[str, Tensor]
) -> None:  # fmt: skip
    """int32 vectors ``numbers`` [R] and tables ``slots`` [R, C] that belong to caches [B, K, C, D]."""
    B, K, C, _ = shape
    rows = next(iter(numbers.values())).numel()
    if rows not in (B, B * K):
        raise ValueError(
            f"sep_decode: {rows} rows of bookkeeping; pass one a batch row ({B}) or one a key head ({B * K})"
        )
    for name, x in (numbers | slots).items():
        wanted = (rows, C) if name in slots else (rows,)
        if x.shape != wanted or x.dtype != torch.int32 or x.device != device:
            raise ValueError(
                f"sep_decode: {name} is {tuple(x.shape)} of {x.dtype} on {x.device}; "
                f"pass {wanted} of torch.int32 on {device}"
            )


def _check_rotary(rotary: Rotary, k: Tensor) -> None:
    cos, sin = rotary
    C, D = k.shape[2:]
    fits = cos.dim() == 2 and cos.shape == sin.shape and cos.shape[0] >= C and 0 < 2 * cos.shape[1] <= D
    if not fits or {cos.dtype, sin.dtype} != {torch.float32} or {cos.device, sin.device} != {k.device}:
        raise ValueError(
            f"sep_decode: rotary is cos {tuple(cos.shape)} of {cos.dtype} on {cos.device} and "
            f"sin {tuple(sin.shape)} of {sin.dtype} on {sin.device}; "
            f"pass torch.float32 [at least {C} slots, at most {D // 2} angles] on {k.device}"
        )


def _check_arrived(arrived: Tensor, k: Tensor) -> None:
    wanted = tuple(k.shape[:2])
    fits = arrived.shape == wanted and arrived.dtype == torch.int32 and arrived.is_contiguous()
    if not fits or arrived.device != k.device:
        raise ValueError(
            f"sep_decode: arrived is {tuple(arrived.shape)} of {arrived.dtype} on {arrived.device}; "
            f"pass contiguous {wanted} zeros of torch.int32 on {k.device}"
        )


def _check_dependent(q: Tensor) -> None:
    reason = dependent_launches(Call.on(q.device, q.dtype))
    if reason is not None:
        raise BackendError(f"sep_decode: dependent=True: {reason}; pass dependent=False")

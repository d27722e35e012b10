"""The table of what computes each operation, and how a caller that holds tensors finds its function there.

A new kernel is a new row of ``OPERATIONS``; README.md says how. Tests and benchmarks walk the table. A model asks once,
when it is built.
"""

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import assume_constant_result

from megatron_sep.kernels import why_not
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import Implementation, Operation, always, biased_on_cuda, never, on_cuda

_KERNELS = "megatron_sep.kernels"
_SEP, _FULL, _DECODE = f"{_KERNELS}.sep_attention", f"{_KERNELS}.full_attention", f"{_KERNELS}.sep_decode"
_NORM, _LOSS, _ADAMW = f"{_KERNELS}.norm", f"{_KERNELS}.cross_entropy", f"{_KERNELS}.adamw"
_ROTARY, _GELU = f"{_KERNELS}.rotary", f"{_KERNELS}.gelu"

# Rows that are tested and timed together
_attention = partial(Implementation, benchmark="tools/bench_attention.py", tests="tests/kernels/test_sep_attention.py")
_full = partial(_attention, tests="tests/kernels/test_full_attention.py")
_fused = partial(_attention, tests="tests/kernels/test_sep_attention_fused.py")
_decode = partial(Implementation, benchmark="tools/bench_decode.py", tests="tests/kernels/test_sep_decode.py")
_norm = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/kernels/test_norm.py")
_loss = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/kernels/test_cross_entropy.py")
_rotary = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/kernels/test_rotary.py")
_gelu = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/kernels/test_gelu.py")
_adamw = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/kernels/test_adamw.py")

_no_apex_norm = why_not.packages("apex.normalization", "fused_layer_norm_cuda")
_no_apex_adam = why_not.packages("apex.optimizers", "amp_C")
_no_transformer_engine = why_not.packages("transformer_engine.pytorch")
_no_transformer_engine_adam = why_not.packages("transformer_engine.pytorch.optimizers")

OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "sep_attention",
            (
                _fused("triton", f"{_SEP}.triton:triton_attention", why_not.fused_attention, on_cuda),
                _attention("flex", f"{_SEP}.flex:flex_sep_attention", why_not.flex_attention, never),
                _attention("reference", f"{_SEP}.reference:reference_attention", why_not.nothing, always),
            ),
        ),
        Operation(
            "full_attention",
            (
                _full("torch", f"{_FULL}.native:causal_attention", why_not.causal_attention, always),
                _fused("triton", f"{_SEP}.triton:triton_attention", why_not.fused_attention, biased_on_cuda),
                _full("reference", f"{_SEP}.reference:reference_attention", why_not.nothing, always),
            ),
        ),
        Operation(
            "sep_decode",
            (
                _decode("triton", f"{_DECODE}.triton:triton_decode", why_not.fused_decode, on_cuda),
                _decode("reference", f"{_DECODE}.reference:reference_decode", why_not.nothing, always),
            ),
        ),
        Operation(
            "sep_compact",
            (
                _decode("triton", f"{_DECODE}.triton:triton_compact", why_not.fused_decode, on_cuda),
                _decode("reference", f"{_DECODE}.reference:reference_compact", why_not.nothing, always),
            ),
        ),
        Operation(
            "layernorm",
            (
                _norm("triton", f"{_NORM}.triton:LayerNorm", why_not.fused_rows, on_cuda),
                _norm("torch", f"{_NORM}.native:layer_norm", why_not.nothing, always),
                _norm("transformer_engine", f"{_NORM}.transformer_engine:layer_norm", _no_transformer_engine, never),
                _norm("apex", f"{_NORM}.apex:layer_norm", _no_apex_norm, never),
                _norm("reference", f"{_NORM}.reference:LayerNorm", why_not.nothing, never),
            ),
        ),
        Operation(
            "rmsnorm",
            (
                _norm("triton", f"{_NORM}.triton:RMSNorm", why_not.fused_rows, on_cuda),
                _norm("torch", f"{_NORM}.native:rms_norm", why_not.nothing, always),
                _norm("transformer_engine", f"{_NORM}.transformer_engine:rms_norm", _no_transformer_engine, never),
                _norm("apex", f"{_NORM}.apex:rms_norm", _no_apex_norm, never),
                _norm("reference", f"{_NORM}.reference:RMSNorm", why_not.nothing, never),
            ),
        ),
        Operation(
            "open_residual",
            (
                _norm("triton", f"{_NORM}.triton:open_residual", why_not.fused_rows, on_cuda),
                _norm("reference", f"{_NORM}.residual:open_residual", why_not.nothing, always),
            ),
        ),
        Operation(
            "split_rotated",
            (
                _rotary("triton", f"{_ROTARY}.triton:split_rotated", why_not.fused_rows, on_cuda),
                _rotary("reference", f"{_ROTARY}.reference:split_rotated", why_not.nothing, always),
            ),
        ),
        Operation(
            "bias_gelu",
            (
                _gelu("triton", f"{_GELU}.triton:bias_gelu", why_not.fused_rows, on_cuda),
                _gelu("torch", f"{_GELU}.native:bias_gelu", why_not.nothing, always),
                _gelu("reference", f"{_GELU}.reference:bias_gelu", why_not.nothing, never),
            ),
        ),
        Operation(
            "cross_entropy",
            (
                _loss("triton", f"{_LOSS}.triton:token_losses", why_not.fused_loss, on_cuda),
                _loss("torch", f"{_LOSS}.native:token_losses", why_not.whole_vocabulary, always),
                _loss("reference", f"{_LOSS}.reference:token_losses", why_not.whole_vocabulary, never),
            ),
        ),
        Operation(
            "adamw",
            (
                _adamw("torch", f"{_ADAMW}.native:ADAMW", why_not.nothing, always),
                _adamw("transformer_engine", f"{_ADAMW}.transformer_engine:ADAMW", _no_transformer_engine_adam, never),
                _adamw("apex", f"{_ADAMW}.apex:ADAMW", _no_apex_adam, never),
                _adamw("reference", f"{_ADAMW}.reference:ADAMW", why_not.nothing, never),
            ),
        ),
    )
}


def function_for(
    operation: str, backend: str, device: torch.device, dtype: torch.dtype, **facts: int | bool
) -> Callable[..., Any]:
    """The function for a call on tensors that are at hand; ``facts`` are the other fields of ``Call``.

    In compiled code it is a constant of the graph, so the facts must be constants there, not symbols.
    """
    found: Callable[..., Any] = getattr(_loaded, _constant_key(operation, backend, device, dtype, **facts))
    return found


@assume_constant_result  # type: ignore[untyped-decorator]
def _constant_key(operation: str, backend: str, device: torch.device, dtype: torch.dtype, **facts: int | bool) -> str:
    return _load(operation, backend, device, dtype, **facts)


@cache
def _load(operation: str, backend: str, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
    """Load the function for a call; its key in ``_loaded``, because a constant of a graph may be no function."""
    row = OPERATIONS[operation].choose(Call.on(device, dtype, **facts), backend)
    key = f"{operation}__{row.name}"
    setattr(_loaded, key, row.load())
    return key


_loaded = SimpleNamespace()

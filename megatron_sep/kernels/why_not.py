"""Why an implementation cannot take a call, in words: the value that stands in the way and, where there is one, a way
out. None: it can.
"""

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import torch

from megatron_sep.kernels.call import Call

WhyNot: TypeAlias = Callable[[Call], str | None]

_FUSED_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
"""Of the GPUs that Triton 3 supports."""
_DEPENDENT_CAPABILITY = (9, 0)
"""Of the GPUs that start a kernel while the one before it still ends."""
DEPENDENT_OPTION = "triton.enable_pdl"
"""What Inductor calls such launches of its own kernels."""


def nothing(_call: Call) -> None:
    """Of what takes every call."""


def fused_attention(call: Call) -> str | None:
    """Of ``sep_attention/triton.py``."""
    if call.head_size > 256:
        return f"the fused kernel takes head sizes to 256, not {call.head_size}"
    if not call.positive_scale:
        return "the fused kernel takes a positive scale alone"
    if not call.even:
        return "the fused kernel takes plans with one window for all keys that are no landmarks, this one has others"
    return _adjusting(call) or _dropout(call) or _wrong_type(call) or _no_triton(call)


def flex_attention(call: Call) -> str | None:
    """Of ``sep_attention/flex.py``."""
    if call.device == "cpu" and call.training:
        return "FlexAttention has no backward pass on the CPU; call it under torch.no_grad()"
    if call.device == "cuda" and call.head_size < 16:
        return f"FlexAttention takes head sizes from 16 on CUDA, not {call.head_size}"
    return (
        _adjusting(call) or _dropout(call) or _wrong_type(call) or (None if call.device == "cpu" else _no_triton(call))
    )


def causal_attention(call: Call) -> str | None:
    """Of ``full_attention/native.py``."""
    if call.biased:
        return "torch's causal kernels take no bias of distance (ALiBi)"
    if not call.whole:
        return "torch's causal kernels want as many queries as keys, these are a span of them"
    return _adjusting(call)


def fused_decode(call: Call) -> str | None:
    """Of ``sep_decode/triton.py``."""
    if call.head_size % 8 or not 16 <= call.head_size <= 256:
        return f"the fused kernel takes head sizes from 16 to 256 in steps of 8, not {call.head_size}"
    return _wrong_type(call) or _no_triton(call)


def dependent_launches(call: Call) -> str | None:
    """Of kernels that start while the one before them still ends, those of ``sep_decode/triton.py`` and Inductor's."""
    if call.device != "cuda" or torch.version.hip is not None:
        return f"dependent launches need a GPU of NVIDIA, the tensors are on {call.device}"
    if call.capability < _DEPENDENT_CAPABILITY:
        found, least = (".".join(map(str, numbers)) for numbers in (call.capability, _DEPENDENT_CAPABILITY))
        return f"the GPU has compute capability {found}, dependent launches need {least}"
    return _no_triton(call) or _no_dependent_code()


def fused_rows(call: Call) -> str | None:
    """Of the kernels that pass over rows once: norms, rotation, GELU."""
    return _wrong_type(call) or _no_triton(call)


def fused_loss(call: Call) -> str | None:
    """Of ``cross_entropy/triton.py``."""
    return whole_vocabulary(call) or fused_rows(call)


def whole_vocabulary(call: Call) -> str | None:
    """Of a loss that sees all logits of a token."""
    if call.tensor_parallel == 1:
        return None
    return f"the vocabulary is split over {call.tensor_parallel} ranks; set parallel.tensor=1"


def bf16_gradient(call: Call) -> str | None:
    """Of megatron-core's fused loss."""
    if call.device != "cuda":
        return f"it is compiled for CUDA, the tensors are on {call.device}"
    if call.dtype != torch.bfloat16:
        return f"it rounds its gradient to bf16, the logits are {call.dtype}"
    return None


def packages(*modules: str) -> WhyNot:
    """Of what needs modules that this project does not depend on, and a GPU."""

    def why_not(call: Call) -> str | None:
        if call.device != "cuda":
            return f"it needs CUDA, the tensors are on {call.device}"
        return next(filter(None, map(_import_failure, modules)), None)

    return why_not


def _adjusting(call: Call) -> str | None:
    return "it has no self-adjusting softmax" if call.adjusting else None


def _dropout(call: Call) -> str | None:
    return "it has no dropout; set the dropout to 0" if call.dropout else None


def _wrong_type(call: Call) -> str | None:
    return None if call.dtype in _FUSED_TYPES else f"it takes bf16, fp16 or fp32, not {call.dtype}"


def _no_triton(call: Call) -> str | None:
    interpreted = call.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if call.device != "cuda" and not interpreted:
        return f"the tensors are on {call.device}, Triton needs CUDA (or TRITON_INTERPRET=1 and the CPU, slow)"
    if call.device == "cuda" and call.capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, numbers)) for numbers in (call.capability, _LEAST_CAPABILITY))
        return f"the GPU has compute capability {found}, Triton needs {least}"
    return _import_failure("triton")


@lru_cache
def _no_dependent_code() -> str | None:
    """Of the libraries that would make such kernels."""
    if not hasattr(importlib.import_module("triton.language").extra.cuda, "gdc_wait"):
        found = importlib.import_module("triton").__version__
        return f"Triton {found} has no tl.extra.cuda.gdc_wait; install 3.4 or later"
    if DEPENDENT_OPTION not in torch._inductor.list_options():
        return f"torch {torch.__version__} has no torch._inductor.config.{DEPENDENT_OPTION}; install 2.11 or later"
    return None


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation fails in its own ways, and each is a reason
        return f"{module} cannot be imported ({error}); install it"
    return None

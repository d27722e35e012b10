"""The operations of a model: each resolved once, when the model is built, and handed down from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from megatron_sep.kernels import registry, why_not
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.cross_entropy import TokenLosses
from megatron_sep.kernels.norm import MakeNorm
from megatron_sep.kernels.operation import BackendError, Implementation, Operation, always, on_cuda
from megatron_sep.kernels.sep_attention import Attention

_MEGATRON = "megatron_sep.model.split_vocabulary"
_loss = partial(Implementation, benchmark="tools/bench_operations.py", tests="tests/model/test_operations.py")
SPLIT_VOCABULARY = (
    _loss("megatron_fused", f"{_MEGATRON}:fused_token_losses", why_not.bf16_gradient, on_cuda),
    _loss("megatron", f"{_MEGATRON}:token_losses", why_not.nothing, always),
)
"""Further rows of ``cross_entropy``: megatron-core's, for a vocabulary that the tensor-parallel ranks share."""


@dataclass(frozen=True)
class Operations:
    """What computes a model, whose layers and engine look nothing up themselves."""

    full_attention: Attention
    sep_attention: Attention
    norm: MakeNorm
    token_losses: TokenLosses
    adamw: AdamW


def operations_table() -> Mapping[str, Operation]:
    """The registry with the rows that need megatron-core."""
    table = registry.OPERATIONS
    return table | {"cross_entropy": table["cross_entropy"].with_rows(*SPLIT_VOCABULARY)}


def resolve(call: Call, norm: str, backends: Mapping[str, str]) -> Operations:
    """Choose and import everything for a model: ``call`` says what it will compute, ``norm`` which norm it has.

    ``backends``: rows by operation; auto where none is named. Raises BackendError.
    """
    table = operations_table()
    unknown = ", ".join(sorted(backends.keys() - table.keys()))
    if unknown:
        raise BackendError(f"there is no operation {unknown}; name some of {', '.join(table)}")
    found = {
        name: table[name].resolve(call, backends.get(name, "auto"))
        for name in ("full_attention", "sep_attention", norm, "cross_entropy", "adamw")
    }
    return Operations(
        full_attention=found["full_attention"],
        sep_attention=found["sep_attention"],
        norm=found[norm],
        token_losses=found["cross_entropy"],
        adamw=found["adamw"],
    )

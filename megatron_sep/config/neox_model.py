"""What GPT-NeoX's keys say of a layer's norms, biases and MLP, as values of ours."""

import math
from collections.abc import Iterator

from megatron_sep.config.neox_rules import NeoxError, Tree

_MLP_KINDS = {
    ("regular", "gelu"): "gelu",
    ("regular", "relu"): "relu",
    ("regular", "swiglu"): "swiglu",
    ("llama", "silu"): "swiglu",
    ("llama", "swish"): "swiglu",
}
"""By mlp_type and activation. Older files call an MLP whose gate is SiLU `llama`; it has no biases."""
_LLAMA_MULTIPLE = 256
"""What `mlp_type: llama` rounds its width up to where the file does not give one."""


def mlp(values: Tree) -> Tree:
    """Kind and width of the MLP."""
    if not values.keys() & {"activation", "mlp_type", "intermediate_size"}:
        return {}
    kind, activation = values.get("mlp_type", "regular"), values.get("activation", "gelu")
    if (kind, activation) not in _MLP_KINDS:
        raise NeoxError(
            f"activation={activation!r} with mlp_type={kind!r}: an MLP is gelu, relu or swiglu, which older "
            "files write as silu with mlp_type='llama'"
        )
    ours = {"model.activation": _MLP_KINDS[kind, activation]}
    if "hidden_size" not in values:
        return ours
    width = _llama_width(values) if kind == "llama" else _width(values, gated=activation == "swiglu")
    return ours | {"model.ffn_hidden_size": width}


def _llama_width(values: Tree) -> int:
    """As given, or 8/3 of the hidden size, rounded up."""
    return _whole(values.get("intermediate_size") or _up(int(2 * values["hidden_size"] * 4 / 3), _LLAMA_MULTIPLE))


def _width(values: Tree, gated: bool) -> int:
    """Columns of the second matrix. A gate takes a third of the size that is given, so two thirds are two halves."""
    hidden, multiple = values["hidden_size"], values.get("mlp_multiple_of", 1)
    size = _whole(values.get("intermediate_size") or values.get("expansion_factor", 4) * hidden)
    if gated:
        size = int(size * 2 / 3)
    first, second = _up(size, 2 * multiple), _up(size // 2 if gated else size, multiple)
    if first != second * (2 if gated else 1):
        raise NeoxError(
            f"mlp_multiple_of={multiple}: GPT-NeoX rounds the MLP's first matrix up to {first} rows and the second to "
            f"{second} columns, which do not fit each other; give an intermediate_size that divides"
        )
    return second


def _whole(width: float) -> int:
    if not math.isfinite(width):
        raise NeoxError(f"intermediate_size, or expansion_factor x hidden_size, is {width}: no width of an MLP")
    return int(width)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def norms(values: Tree) -> Tree:
    """The epsilon of the norm in use. An RMSNorm has no bias, whatever use_bias_in_norms says."""
    rms = str(values.get("norm")).endswith("rmsnorm")
    if not rms and values.get("use_bias_in_norms") is False:
        raise NeoxError("use_bias_in_norms=False is refused: LayerNorm has a bias here; norm='rmsnorm' has none")
    epsilon = "rms_norm_epsilon" if rms else "layernorm_epsilon"
    return {"model.norm_eps": values[epsilon]} if epsilon in values else {}


def biases(values: Tree) -> Tree:
    """Whether the linear layers of the attention have one, and those of the MLP."""
    found = {key: values[key] for key in ("use_bias_in_attn_linear", "use_bias_in_mlp") if key in values}
    if "use_bias_in_attn_linear" in found and _follows(values):
        found["use_bias_in_mlp"] = found["use_bias_in_attn_linear"]
    elif values.get("mlp_type") == "llama":
        found["use_bias_in_mlp"] = False
    elif "use_bias_in_attn_linear" in found:
        found.setdefault("use_bias_in_mlp", True)
    ours = {"use_bias_in_attn_linear": "model.biases", "use_bias_in_mlp": "model.mlp_biases"}
    if len(set(found.values())) == 1:  # one word for both
        return {"model.biases": next(iter(found.values()))}
    return {ours[key]: value for key, value in found.items()}


def _follows(values: Tree) -> bool:
    """Whether the MLP's biases are those of the attention for want of a word: Llama's files mean none."""
    return values.get("activation") == "swiglu" and "use_bias_in_mlp" not in values


def remarks(values: Tree) -> Iterator[str]:
    """Where what is meant was taken instead of what GPT-NeoX's code would do."""
    if _follows(values) and values.get("use_bias_in_attn_linear") is False:
        yield (
            "use_bias_in_mlp: left out, and taken to be False as in the attention; GPT-NeoX would give a Llama's MLP "
            "biases that start at 0"
        )

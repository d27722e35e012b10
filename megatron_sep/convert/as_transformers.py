"""Weights from anywhere as a model of transformers in memory."""

from typing import Any

import torch

from megatron_sep.config.position import PositionConfig
from megatron_sep.weights.export import export_rules
from megatron_sep.weights.hugging_face import make_config
from megatron_sep.weights.names import PLACES, to_hugging_face
from megatron_sep.weights.open_source import OpenedSource


def as_transformers(
    source: OpenedSource, device: torch.device, dtype: torch.dtype | None = None, weights_alone: bool = False
) -> Any:
    """GPTNeoXForCausalLM or LlamaForCausalLM in evaluation mode; it sees every earlier token, whatever the pattern.

    ``dtype``: None takes that of the weights. Raises HuggingFaceError for a model that transformers does not have; with
    ``weights_alone`` one that only has other positions or another softmax is let through, for who adds those.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {"position": PositionConfig(), "self_adjusting_softmax": None} if weights_alone else {}
    settings = make_config(
        source.config.model_copy(update=plain), source.vocab_size, export_rules(source), "float32", None
    )
    config = AutoConfig.for_model(**{k: v for k, v in settings.items() if k not in ("auto_map", "architectures")})
    dtype = dtype or next(tensor.dtype for group in source for tensor in group.values())
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, source)
    return model.eval()


def fill(model: Any, source: OpenedSource) -> None:
    """Copy the weights of a source into a model of transformers, whatever its class calls its head."""
    weights = to_hugging_face({name: tensor for group in source for name, tensor in group.items()}, source.config)
    weights.pop(PLACES.theirs[0] + ".weight", None)
    head = next(name for name in ("embed_out", "lm_head") if name in model._modules)
    state = {(f"{head}.weight" if n in ("embed_out.weight", "lm_head.weight") else n): w for n, w in weights.items()}
    missing, strange = model.load_state_dict(state, strict=False)
    wrong = [*(name for name in missing if name != f"{head}.weight" or not source.config.tie_embeddings), *strange]
    if wrong:
        raise RuntimeError(f"transformers names other weights: {wrong}")

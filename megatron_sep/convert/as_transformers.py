"""Weights from anywhere as a model of transformers in memory."""

from typing import Any

import torch

from megatron_sep.model.hugging_face import make_config
from megatron_sep.model.weights import to_hugging_face
from megatron_sep.train.start import OpenedSource, export_rules


def as_transformers(source: OpenedSource, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """GPTNeoXForCausalLM or LlamaForCausalLM in evaluation mode; it sees every earlier token, whatever the pattern.

    ``dtype``: None takes that of the weights. Raises HuggingFaceError for a model that transformers does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = make_config(source.config, source.vocab_size, export_rules(source), "float32", None)
    config = AutoConfig.for_model(**{k: v for k, v in settings.items() if k not in ("auto_map", "architectures")})
    weights = {name: tensor for group in source for name, tensor in group.items()}
    dtype = dtype or next(iter(weights.values())).dtype
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    spelled = to_hugging_face(weights, source.config)
    state = {("lm_head.weight" if name == "embed_out.weight" else name): weight for name, weight in spelled.items()}
    missing, strange = model.load_state_dict(state, strict=False)
    wrong = [*(name for name in missing if name != "lm_head.weight" or not source.config.tie_embeddings), *strange]
    if wrong:
        raise RuntimeError(f"transformers names other weights: {wrong}")
    return model.eval()

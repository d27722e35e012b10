"""`convert --check`: transformers' model with the weights of SRC against this program's with those of DST."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import ParallelConfig
from megatron_sep.data.tokenizer import load_tokenizer
from megatron_sep.model.build import build_model
from megatron_sep.model.hugging_face import make_config
from megatron_sep.model.weights import to_hugging_face
from megatron_sep.parallel.groups import current_device
from megatron_sep.train.start import OpenedSource, export_rules, load_weights, open_source

_TEXT = "The cat sat on the mat, and slept. It was warm; was it not? Yes!\nThen it rained, and the cat went in.\n" * 8


@torch.no_grad()
def largest_difference(source: OpenedSource, dst: Path) -> float:
    """Of the fp32 logits of the same text; both models see every earlier token, so the weights alone are compared."""
    ids = _ids(source).to(current_device())
    theirs, mine = (source, open_source(dst)) if source.own else (open_source(dst), source)
    ours = _own_logits(theirs, ids)
    return float((ours - _transformers_logits(mine, ids)).abs().max())


def _own_logits(source: OpenedSource, ids: Tensor) -> Tensor:
    model = build_model(
        source.config, ParallelConfig(), vocab_size=source.vocab_size, precision="fp32", seed=0, backend="reference"
    )
    load_weights(model, source, source.config)
    plan = AttentionPattern().plan(ids)
    position = torch.arange(ids.shape[1], device=ids.device)[None]
    logits: Tensor = model.eval()(ids, position, (plan,) * source.config.num_layers)
    return logits.float()


def _transformers_logits(source: OpenedSource, ids: Tensor) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = make_config(source.config, source.vocab_size, export_rules(source), "float32", None)
    config = AutoConfig.for_model(**{k: v for k, v in settings.items() if k not in ("auto_map", "architectures")})
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {name: tensor for group in source for name, tensor in group.items()}
    spelled = to_hugging_face(weights, source.config)
    state = {("lm_head.weight" if name == "embed_out.weight" else name): w.float() for name, w in spelled.items()}
    missing, strange = model.load_state_dict(state, strict=False)
    wrong = [*(name for name in missing if name != "lm_head.weight" or not source.config.tie_embeddings), *strange]
    if wrong:
        raise RuntimeError(f"transformers names other weights: {wrong}")
    logits: Tensor = model.to(ids.device).eval()(ids).logits
    return logits.float()


def _ids(source: OpenedSource) -> Tensor:
    length = min(128, source.config.sequence_length)
    if source.tokenizer is not None:
        found = load_tokenizer(source.tokenizer).encode(_TEXT)[:length]
        return torch.tensor([found])
    return torch.randint(0, source.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))

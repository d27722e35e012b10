"""What kvpress keeps of two prompts: writes kvpress_golden.json, which test_policies.py compares the policies with.

It runs in an environment of its own, as kvpress 0.5.5 needs transformers below 5.3:

    python3.11 -m venv /tmp/kvpress
    /tmp/kvpress/bin/pip install torch==2.13.0
    /tmp/kvpress/bin/pip install kvpress==0.5.5 torch==2.13.0
    /tmp/kvpress/bin/python tests/generate/make_kvpress_golden.py

The committed file: kvpress 0.5.5, transformers 5.2.0, torch 2.13.0 (CPU), Python 3.11.7.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

FILE = Path(__file__).with_name("kvpress_golden.json")
LAYERS, LENGTH, STEPS = 3, 40, 4
WINDOW, KERNEL, BETA, RATIO = 4, 5, 3, 0.6
MARGIN = 1e-6
"""Least difference between the scores of the last token that kvpress keeps and of the first that it drops: it rounds
attention to fp32."""


def model(attention: str = "sdpa") -> Any:
    """A Llama of 4 query heads over 2 key heads, fp64, its weights a formula: the same in every library version."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        attn_implementation=attention,
    )
    llama = LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for number, (name, weight) in enumerate(sorted(llama.named_parameters())):
            wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) * (1.7 + 0.13 * number) ** 2 + number)
            size = 1.5 if "q_proj" in name or "k_proj" in name else 0.5  # sharp attention
            weight.copy_((1 + 0.1 * wave if "norm" in name else size * wave).reshape(weight.shape))
    return llama


def tokens() -> Tensor:
    """Two prompts and what follows them, [2, LENGTH + STEPS]."""
    return torch.randint(0, 50, (2, LENGTH + STEPS), generator=torch.Generator().manual_seed(6))


def main() -> None:
    """Run the presses."""
    from kvpress import ObservedAttentionPress, PyramidKVPress, SnapKVPress

    snap = {"compression_ratio": RATIO, "window_size": WINDOW, "kernel_size": KERNEL}
    golden = {
        "snap_kv": _run(SnapKVPress(**snap)),
        "pyramid_kv": _run(PyramidKVPress(**snap, beta=BETA)),
        "observed_attention": _run(ObservedAttentionPress(compression_ratio=RATIO), "eager"),
    }
    del golden["observed_attention"]["logits"]  # the press drops tokens once, H2O one at a time
    FILE.write_text(json.dumps(golden) + "\n")


@torch.no_grad()
def _run(press: Any, attention: str = "sdpa") -> dict[str, Any]:
    """Scores [L][B][K][N], kept places [L][B][K][E] and logits [B][STEPS][V] of the tokens after the prompt."""
    llama, ids, full, cache, scores = model(attention), tokens(), DynamicCache(), DynamicCache(), []
    llama(ids[:, :LENGTH], past_key_values=full)
    score = press.score
    press.score = lambda *args, **kwargs: scores.append(score(*args, **kwargs)) or scores[-1]
    with press(llama):
        llama(ids[:, :LENGTH], past_key_values=cache)
    kept = [_places(a.keys, b.keys) for a, b in zip(full.layers, cache.layers, strict=True)]
    for layer, (score_BKN, place_BKE) in enumerate(zip(scores, kept, strict=True)):
        dropped_BKN = torch.ones_like(score_BKN, dtype=torch.bool).scatter(2, place_BKE, False)
        least = score_BKN.gather(2, place_BKE).amin(2)
        assert (least - score_BKN.where(dropped_BKN, -1).amax(2) > MARGIN).all(), f"{press}, layer {layer}: too close"
    logits = []
    for place in range(LENGTH, LENGTH + STEPS):
        positions = torch.full((2, 1), place)
        logits.append(llama(ids[:, place : place + 1], past_key_values=cache, position_ids=positions).logits)
    return {
        "scores": [_rounded(layer, 8) for layer in scores],
        "kept": [layer.tolist() for layer in kept],
        "logits": _rounded(torch.cat(logits, dim=1), 12),
    }


def _places(full_BKND: Tensor, kept_BKED: Tensor) -> Tensor:
    """Which keys were kept, ascending."""
    same_BKEN = (kept_BKED[:, :, :, None] == full_BKND[:, :, None]).all(-1)
    assert (same_BKEN.sum(-1) == 1).all()
    return same_BKEN.int().argmax(-1).sort(-1).values


def _rounded(x: Tensor, digits: int) -> Any:
    return (x.double() * 10**digits).round().div(10**digits).tolist()


if __name__ == "__main__":
    main()

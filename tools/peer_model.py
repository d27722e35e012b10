"""A plain PyTorch GPT-NeoX and its training step, as one would write them in an afternoon: the peer of benchmarks.

fp32 weights under bf16 autocast, the whole model compiled, torch's fused AdamW, clipping. Attention is cuDNN's, full
and causal, or this project's `sep_attention` under a plan.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sep.attention.pattern import MaskPlan
from megatron_sep.kernels.sep_attention import sep_attention
from megatron_sep.kernels.sep_attention.index import indexed

ROTARY_SHARE, ROTARY_BASE = 0.25, 10000.0


class Layer(nn.Module):
    """x + attention(ln1(x)) + mlp(ln2(x)), with a quarter of each head rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: MaskPlan | None) -> Tensor:
        """x [B, T, width]"""
        qkv: Tensor = self.qkv(self.norm1(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if plan is None:
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            attended = sep_attention(q, k, v, plan)
        transformed: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        out: Tensor = x + self.out(attended.transpose(1, 2).flatten(2)) + transformed
        return out


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first values of each head by the angle of their position; cos and sin [T, values / 2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(t.to(x.dtype) for t in turned), rest), -1)


class Peer(nn.Module):
    """The whole model; called with ids and labels [B, T], it returns the mean loss."""

    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        size = int(width // heads * ROTARY_SHARE)
        angles = torch.arange(length)[:, None] * ROTARY_BASE ** (-torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, labels: Tensor, plan: MaskPlan | None) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, plan)
        loss: Tensor = functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())
        return loss


def peer_step(
    ids_BT1: Tensor, make_plan: Callable[[Tensor], MaskPlan] | None, layers: int, width: int, heads: int, vocab: int
) -> Callable[[], None]:
    """One training step on these rows; ``make_plan``: attention is this project's, under the plan that it makes."""
    model = Peer(vocab, layers, width, heads, ids_BT1.shape[1] - 1).cuda()
    run = torch.compile(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    host = ids_BT1.pin_memory()

    def step() -> None:
        rows = host.cuda(non_blocking=True)
        ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        plan = None if make_plan is None else indexed(make_plan(ids))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.autocast("cuda", torch.bfloat16):
            loss = run(ids, labels, plan)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)

    return step

"""Which measures shorten a decode step at batch 1, where the weights alone take most of it.

    python tools/bench_decode_measures.py [--context 32768] [--profile] [--out measures.json]

One GPU with 40 GB or more.

Each row is the step of tools/bench_decode.py (Llama-3-8B's shape, SepLLM n=256 or a bounded stream, one CUDA graph)
with one more measure; the first two are without a part of what the program does, the last two with more. ``copy ms`` is
what reading the weights once takes at the speed of memory, measured by a copy.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench_decode import SEP, STREAM, filled, free, llama_8b, text, timed
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb

from megatron_sep.generate import decode
from megatron_sep.generate import slots as slots_module
from megatron_sep.generate import step as step_module
from megatron_sep.generate.interface import attention

MEASURES = ("compiled", "products by inductor", "as it is", "products merged", "bookkeeping compiled")
TUNING, APART = decode.OPTIONS


class MergedMLP(LlamaMLP):  # type: ignore[misc]
    """Gate and up as one product."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, self.gate_up).chunk(2, -1)
        out: Tensor = self.down_proj(silu(gate) * up)
        return out


class MergedAttention(LlamaAttention):  # type: ignore[misc]
    """Queries, keys and values as one product."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        shape = hidden_states.shape[:-1]
        q, k, v = (
            part.view(*shape, -1, self.head_dim).transpose(1, 2)
            for part in torch.split(linear(hidden_states, self.qkv), self.sizes, -1)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = attention(self, q, k, v, None, scaling=self.scaling)
        return self.o_proj(out.reshape(*shape, -1)), None


def merge_products(model: Any) -> None:
    """In place; the separate weights become views of the merged ones, so that memory stays what it was."""
    for module in model.modules():
        if type(module) is LlamaMLP:
            module.gate_up = _merged([module.gate_proj, module.up_proj])
            module.__class__ = MergedMLP
        elif type(module) is LlamaAttention:
            parts = [module.q_proj, module.k_proj, module.v_proj]
            module.sizes = [part.out_features for part in parts]
            module.qkv = _merged(parts)
            module.__class__ = MergedAttention


def _merged(parts: list[Any]) -> nn.Parameter:
    whole = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    for part, weight in zip(parts, torch.split(whole, [part.out_features for part in parts]), strict=True):
        part.weight = nn.Parameter(weight, requires_grad=False)
    return whole


def compile_bookkeeping() -> None:
    """What the end of a step does to the slots' tables."""
    for name in ("count_step", "evict"):
        setattr(slots_module, name, torch.compile(getattr(step_module, name), dynamic=False))


def apply_measures(model: Any, number: int) -> None:
    """The first ``number`` measures beside what compilation does anyway."""
    torch.compiler.reset()
    decode.OPTIONS |= {TUNING: number >= 1, APART: 1 if number >= 2 else 8}
    if number >= 3:
        merge_products(model)
    if number >= 4:
        compile_bookkeeping()
    decode.compile_layers(model)


def weights_gib(model: Any) -> float:
    """That a step reads: all but the embedding, of which it reads a row."""
    read = sum(p.numel() * p.element_size() for p in model.parameters()) - model.model.embed_tokens.weight.numel() * 2
    return float(read) / 2**30


def copy_ms(gib: float) -> float:
    """Milliseconds to read so much, by a copy of 4 GiB, which reads and writes them."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), 3, 20) / 8 * gib


def kernels(step: Any, times: int = 10) -> list[tuple[str, float, float]]:
    """Of a replayed step: name, microseconds, launches, the longest together first."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in profile.events():
        if str(event.device_type).endswith("CUDA"):
            spent[event.name[:90]] += event.device_time
            count[event.name[:90]] += 1
    return [(name, spent[name] / times, count[name] / times) for name, _ in spent.most_common(40)]


def measured(model: Any, policy: Any, context: int, profile: bool) -> dict[str, Any]:
    """Of one policy: milliseconds a step, and its kernels where they were asked for."""
    decoder, ids = decode.Decoder(model, filled(model, policy, 1, context)), text(1, 1)
    row: dict[str, Any] = {"ms": timed(lambda: decoder.step(ids), 6, 100)}
    if profile:
        row["kernels"] = kernels(lambda: decoder.step(ids))
        row["busy ms"] = sum(spent for _, spent, _ in row["kernels"]) / 1000
    return row


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--measures", type=int, nargs="+", default=list(range(len(MEASURES))), help="how many to apply")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = llama_8b()
    gib = weights_gib(model)
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy ms": copy_ms(gib)}
    print(f"{found['gpu']}, torch {torch.__version__}: {gib:.2f} GiB of weights, read in {found['copy ms']:.2f} ms")
    for number in sorted(options.measures):
        apply_measures(model, number)
        for name, policy in (("SepLLM n=256", SEP), ("stream 4,64,256,800", STREAM)):
            free()
            row = measured(model, policy, options.context, options.profile)
            found[f"{MEASURES[number]}: {name}"] = row
            print(f"{MEASURES[number]:24s} {name:22s} {row['ms']:.2f} ms", flush=True)
            for kernel, spent, count in row.get("kernels", ()):
                print(f"    {spent:9.1f} us {count:6.1f} x  {kernel}")
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""One decode step of a Llama-3-8B-shaped model with random weights at a long context, by what the cache keeps.

    python tools/bench_decode.py [--context 32768] [--out decode.json]     one GPU with 100 GB or more

Every row is a whole step (embedding to logits) of the same compiled layers, replayed as one CUDA graph, but ``eager``:
transformers' own layers, keys and values concatenated, and a dense mask over all past ids each token, as the authors'
code decodes (arXiv 2412.12094; it drops nothing). The full cache is attended to by torch's flash attention, by cuDNN's,
and by this program's own decode kernel; its context stays the same length, the others grow by the timed tokens.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.attach import attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.generate.layout import Layout
from megatron_sep.generate.slots import Slots

SEPARATORS = (11, 13)
DENSITY = 0.115  # the Pile's, implied by Table 3
SEP = AttentionPattern(window=256, sinks=3, separator_ids=SEPARATORS)
STREAM = StreamingPattern(4, 64, 256, 800, SEPARATORS)
FULL = AttentionPattern()


def llama_8b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14_336,
        max_position_embeddings=131_072,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def text(batch: int, length: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(100, 100_000, (batch, length), generator=generator, device="cuda")
    separator = torch.rand(batch, length, generator=generator, device="cuda") < DENSITY
    return torch.where(separator, SEPARATORS[0], ids)


class DenseFull(Slots):
    """Everything kept, attended to by torch's kernels over a fixed number of slots."""

    backend_of_torch = SDPBackend.FLASH_ATTENTION

    def attend(
        self, layer: int, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float, scoring: object = None
    ) -> Tensor:
        assert scoring is None
        assert self.keys_LBKCD is not None
        assert self.values_LBKCD is not None
        keys, values = self.keys_LBKCD[layer], self.values_LBKCD[layer]
        keys[:, :, self.context - 1 : self.context] = k_BKTD
        values[:, :, self.context - 1 : self.context] = v_BKTD
        k, v = keys[:, :, : self.context], values[:, :, : self.context]
        with sdpa_kernel(self.backend_of_torch):
            return scaled_dot_product_attention(q_BHTD, k, v, scale=scale, enable_gqa=True)

    def end(self) -> None:
        self._scripts = None

    context = 0


class CudnnFull(DenseFull):
    """The same by cuDNN."""

    backend_of_torch = SDPBackend.CUDNN_ATTENTION


def filled(
    model: Any, policy: Any, batch: int, context: int, group_type: type[Slots] = Slots, spare: int = 512
) -> SepCache:
    """A cache as after ``context`` tokens of text, its keys and values random."""
    cache: SepCache = attach(model, policy).new_cache()
    free()
    ids = text(batch, context)
    slots = group_type((policy,), 32, batch, ids.device, rotary=cache.rotary)
    slots.begin(ids, Layout())
    Slots.end(slots)
    slots.context = context  # type: ignore[attr-defined]
    slots.reserve(spare)
    shape = (32, batch, 8, slots.num_slots, 128)
    slots.keys_LBKCD = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    slots.values_LBKCD = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    cache.groups, cache.columns = {policy: slots}, context
    return cache


def timed(step: Callable[[], Any], warm_up: int, steps: int) -> float:
    """Median milliseconds of a step."""
    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def fused_step(model: Any, policy: Any, batch: int, context: int, group_type: type[Slots] = Slots) -> dict[str, float]:
    cache = filled(model, policy, batch, context, group_type)
    decoder = Decoder(model, cache)
    ids = text(batch, 1)
    milliseconds = timed(lambda: decoder.step(ids), 6, 100)
    slots = next(iter(cache.groups.values()))
    live = float(slots.length_R.double().mean())  # type: ignore[attr-defined]
    return {
        "ms": milliseconds,
        "tokens_per_s": 1000 * batch / milliseconds,
        "slots": live,
        "gib": slots.num_bytes / 2**30,
    }


def eager_step(model: Any, batch: int, context: int) -> dict[str, float]:
    """The authors' way: transformers' eager attention, keys concatenated, a dense mask from all ids each token."""
    free()
    attach(model, FULL).detach()
    model.set_attn_implementation("eager")
    cache, ids = DynamicCache(), text(batch, context)
    for layer in range(32):
        cache.update(*(torch.randn(2, batch, 8, context, 128, dtype=torch.bfloat16, device="cuda")), layer)
    state = {"ids": ids}

    @torch.no_grad()
    def step() -> None:
        state["ids"] = torch.cat([state["ids"], text(batch, 1)], 1)
        past = state["ids"]
        position = torch.arange(past.shape[1], device="cuda")
        separator = torch.isin(past, torch.tensor(SEPARATORS, device="cuda"))
        seen = separator | (position < 3) | (position >= past.shape[1] - 256)
        mask = torch.where(seen, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)[:, None, None]
        model(past[:, -1:], attention_mask=mask, position_ids=position[None, -1:], **{cache_name(model): cache})

    milliseconds = timed(step, 3, 20)
    return {"ms": milliseconds, "tokens_per_s": 1000 * batch / milliseconds}


def largest_batch(model: Any, policy: Any, context: int) -> tuple[int, dict[str, float]]:
    """The largest multiple of 4 whose cache fits beside the weights and takes steps, by trying, and its step."""
    per_text = fused_step(model, policy, 4, context)["gib"] / 4
    free()
    batch = int(torch.cuda.mem_get_info()[0] / 2**30 / per_text) // 4 * 4
    while batch > 0:
        try:
            return batch, fused_step(model, policy, batch, context)
        except torch.OutOfMemoryError:
            batch -= 4
    raise SystemExit("not even four texts fit")


def report(name: str, batch: int, row: dict[str, float]) -> dict[str, float]:
    """Print a row and give it back."""
    print(f"{name:22s} batch {batch:3d}  " + "  ".join(f"{k} {v:,.2f}" for k, v in row.items()), flush=True)
    return row


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("steps", "largest"), help="one half of it")
    options = parser.parse_args()
    model = llama_8b()
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "context": options.context,
    }
    if options.only != "largest":
        found["eager, batch 1"] = report("the authors' way", 1, eager_step(model, 1, options.context))
        model.set_attn_implementation("sdpa")
    compile_layers(model)
    kinds: dict[str, tuple[Any, type[Slots]]] = {
        "full, torch flash": (FULL, DenseFull),
        "full, cuDNN": (FULL, CudnnFull),
        "full, own kernel": (FULL, Slots),
        "SepLLM n=256": (SEP, Slots),
        "stream 4,64,256,800": (STREAM, Slots),
    }
    for batch in (1, options.batch) if options.only != "largest" else ():
        for name, (policy, group_type) in kinds.items():
            row = fused_step(model, policy, batch, options.context, group_type)
            found[f"{name}, batch {batch}"] = report(name, batch, row)
    for name in ("full, own kernel", "SepLLM n=256") if options.only != "steps" else ():
        batch, row = largest_batch(model, kinds[name][0], options.context)
        found[f"{name}, largest batch"] = {"batch": batch} | report(name, batch, row)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

"""Tokens a second for a folder of prompts: a small cache whose rows change hands against a full one in static batches.

    python tools/bench_throughput.py [--prompt 8192] [--new 2048] [--memory-gib 40] [--out throughput.json]

One GPU with 80 GB or more. Llama-3-8B's shape with random weights; prompts of unequal length around ``--prompt`` and
texts that end at unequal lengths up to ``--new``, the same for both. Both hold at most ``--memory-gib`` of keys and
values: the full cache as many texts as fit at their longest, in batches that last as long as their longest text; the
small one (SepLLM n=256) as many rows as fit, each taken by the next prompt when its text ends. Prefill is part of both;
its share grows as ``--new`` falls, and no cache shortens it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_decode import DENSITY, FULL, SEP, SEPARATORS, free, llama_8b

from megatron_sep.generate.attach import attach
from megatron_sep.generate.decode import Decoder, compile_layers
from megatron_sep.generate.many import Many
from megatron_sep.generate.sampler import Sampling

BYTES_A_TOKEN = 2 * 32 * 8 * 128 * 2
"""Of keys and values in bf16, all layers."""
END = 128_001


class Numbers:
    """A tokenizer of texts that are lists of numbers."""

    eod_id, vocab_size = END, 128_256

    def encode(self, text: str) -> list[int]:
        """The numbers."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The numbers as text."""
        return " ".join(map(str, ids))


class Ending(Many):
    """Texts end where a list says, as those of a trained model end at lengths of their own."""

    lengths: tuple[int, ...] = ()

    def _take(self, rows: list[int], logits_RV: torch.Tensor, next_B1: torch.Tensor) -> Iterator[Any]:
        for index, row in enumerate(rows):
            text = self._rows[row]
            assert text is not None
            logits_RV[index, END] = 1e4 if len(text.ids) + 1 >= self.lengths[text.number] else -1e4
        return super()._take(rows, logits_RV, next_B1)


def prompts_and_ends(count: int, prompt: int, new: int) -> tuple[list[str], tuple[int, ...]]:
    """Prompts of half to one and a half times ``prompt`` tokens, and how far each goes on: 1/8 to all of ``new``."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(prompt // 2, prompt * 3 // 2, (count,), generator=generator).tolist()
    ends = torch.randint(new // 8, new + 1, (count,), generator=generator).tolist()
    texts = []
    for length in lengths:
        ids = torch.randint(100, 100_000, (length,), generator=generator)
        ids[torch.rand(length, generator=generator) < DENSITY] = SEPARATORS[0]
        texts.append(" ".join(map(str, ids.tolist())))
    return texts, tuple(ends)


def small(model: Any, texts: list[str], ends: tuple[int, ...], rows: int, new: int) -> dict[str, float]:
    """Rows that change hands under the small cache."""
    many = Ending(attach(model, SEP), model, Numbers(), Sampling(new, 0.8), rows)  # type: ignore[arg-type]
    many.lengths = ends
    torch.cuda.synchronize()
    begun = time.perf_counter()
    results = list(many.run(enumerate(texts)))
    torch.cuda.synchronize()
    tokens, seconds = sum(result.tokens for result in results), time.perf_counter() - begun
    first = sorted(result.first_token_s for result in results)[len(results) // 2]
    return {"rows": rows, "tokens": tokens, "s": seconds, "tokens/s": tokens / seconds, "first token s": first,
            "cache GiB": many.peak_bytes / 2**30}  # fmt: skip


@torch.no_grad()
def static(model: Any, texts: list[str], ends: tuple[int, ...], rows: int, new: int) -> dict[str, float]:
    """Batch after batch with everything kept; a batch lasts as long as its longest text."""
    attachment, tokenizer = attach(model, FULL), Numbers()
    torch.cuda.synchronize()
    begun, tokens = time.perf_counter(), 0
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # of like length, so that little is padding
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        free()
        cache = attachment.new_cache()
        ids = [tokenizer.encode(texts[index]) for index in part]
        cache.open(len(part), model.device)
        for row, prompt in enumerate(ids):  # one by one, without padding: 8k tokens fill the device
            alone = attachment.new_cache()
            Decoder(model, alone, graph=False).read(torch.tensor([prompt], device="cuda"), chunk=len(prompt))
            cache.put([row], alone)
        cache.reserve(new + 1)
        decoder, next_B1 = Decoder(model, cache), torch.full((len(part), 1), 100, device="cuda")
        for _ in range(max(ends[index] for index in part) - 1):
            next_B1 = decoder.step(next_B1).argmax(-1, keepdim=True)
        tokens += sum(ends[index] - 1 for index in part)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    return {"rows": rows, "tokens": tokens, "s": seconds, "tokens/s": tokens / seconds}


def read_eagerly() -> None:
    """Prompts have lengths of their own: layers compiled for a step would be compiled again for each of them."""
    read = Decoder.read

    def eager(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.compiler.set_stance("force_eager"):
            return read(*args, **kwargs)

    Decoder.read = eager  # type: ignore[method-assign]


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--new", type=int, default=2048)
    parser.add_argument("--memory-gib", type=float, default=40)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--only", choices=("small", "static"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = llama_8b()
    compile_layers(model)
    read_eagerly()
    texts, ends = prompts_and_ends(options.prompts, options.prompt, options.new)
    longest = options.prompt * 3 // 2
    kept = int(longest * DENSITY * 1.1) + 256 + 3 + 512
    memory = options.memory_gib * 2**30 / BYTES_A_TOKEN
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | vars(options)
    for name, loop, tokens in (("small", small, kept), ("static", static, longest + options.new)):
        if options.only not in (None, name):
            continue
        rows = max(1, min(int(memory / tokens), options.prompts))
        loop(model, texts[:2], tuple(min(end, 8) for end in ends), 2, 8)  # compiles what there is to compile
        free()
        found[name] = loop(model, texts, ends, rows, options.new)
        print(f"{name:8s}" + "  ".join(f"{key} {value:,.2f}" for key, value in found[name].items()), flush=True)
    if "small" in found and "static" in found:
        print(f"{found['small']['tokens/s'] / found['static']['tokens/s']:.2f} times the tokens a second")
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, default=str))


if __name__ == "__main__":
    main()

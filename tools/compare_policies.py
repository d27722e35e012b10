"""Perplexity of a trained model under cache policies that keep the same measured share of the tokens.

    python tools/compare_policies.py CHECKPOINT [CHECKPOINT ...] --books DIR [--out table.json]

Each text is a stretch of a book: a prompt at once, then one token after another, as in decoding. The share is measured
over the tokens after the prompt: tokens that a query saw over tokens of the text so far, mean over layers and heads.
SepLLM's on all texts sets the share; the others' free number is searched on the first four.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.evaluate.perplexity import Score, score
from megatron_sep.evaluate.texts import know
from megatron_sep.generate.layer_policies import head_policies
from megatron_sep.generate.load import load
from megatron_sep.generate.policies import H2O, SnapKV, pyramid_kv
from megatron_sep.parallel.device import current_device
from megatron_sep.weights.identity import WEIGHTS, weights_sum

Policy = Any
Family = Callable[[int], Policy]
"""A policy by its free number: more keeps more."""


def stretches(folder: Path, tokenizer: Tokenizer, length: int, per_book: int) -> Tensor:
    """The first ``per_book`` stretches of every book in ``folder``, int64 [B, length]."""
    rows = []
    for path in sorted(folder.glob("*.txt")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[: 8 * length * (per_book + 1)])
        rows += [ids[i * length : (i + 1) * length] for i in range(per_book)]
    kept = [row for row in rows if len(row) == length]
    if not kept:
        raise SystemExit(f"{folder}: no *.txt of {length} tokens or more")
    return torch.tensor(kept)


def families(config: Any, ids: tuple[int, ...], density: float) -> dict[str, Family]:
    """Policies by their free number."""
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    stride = round(1 / density)
    few = (key_heads - 1) * (heads // key_heads)
    return {
        "SepLLM streaming, positions in the cache": lambda n: StreamingPattern(4, n // 4, n // 2, 4 + n + n // 4, ids),
        "StreamingLLM": lambda n: AttentionPattern(window=n, sinks=3),
        f"FixLLM, every {stride}th token": lambda n: AttentionPattern(window=n, sinks=3, stride=stride),
        f"windows in {few} of {heads} heads": lambda n: head_policies(
            AttentionPattern(window=n), few, heads, key_heads
        ),
        "SnapKV": lambda n: SnapKV(max(n, 32), 32, 7),
        "PyramidKV": lambda n: pyramid_kv(max(n, 32), 32, 7, 20, layers),
        "H2O": lambda n: H2O(n // 2, n - n // 2),
    }


def searched(family: Family, share: float, length: int, probe: Callable[[Policy], Score]) -> tuple[int, Policy]:
    """The free number whose measured share comes nearest to ``share``: the share is nearly linear in the number."""
    number = round(share * length)
    tried = {number: probe(family(number)).retention.share}
    number = max(1, round(number * share / tried[number]))
    for _ in range(4):
        if number in tried:
            break
        tried[number] = probe(family(number)).retention.share
        (a, at_a), (b, at_b) = sorted(tried.items(), key=lambda pair: abs(pair[1] - share))[:2]
        slope = (at_b - at_a) / (b - a)
        if abs(at_a - share) < 0.005 * share or slope <= 0:
            break
        number = max(1, round(a + (share - at_a) / slope))
    best = min(tried, key=lambda n: abs(tried[n] - share))
    return best, family(best)


def compare(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    place = know(path).place
    weights, loaded = weights_sum(place), load(place, current_device(), torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = stretches(options.books, tokenizer, options.length, options.per_book).to(model.device)
    ids = loaded.rules(AttentionConfig(window=1, separators="default")).separators.separator_ids
    density = float(torch.isin(texts, torch.tensor(ids, device=texts.device)).double().mean())
    sep = AttentionPattern(window=options.window, sinks=3, separator_ids=ids)
    eager = (H2O, SnapKV, list)

    def run(policy: Policy, rows: Tensor) -> Score:
        return score(model, policy, rows, options.prompt, graph=False if isinstance(policy, eager) else None)

    full, own = run(AttentionPattern(), texts), run(sep, texts)
    trained = loaded.attention
    result: dict[str, Any] = {
        "checkpoint": str(path),
        WEIGHTS: weights,
        "trained_with": f"window={trained.window}",
        "texts": len(texts),
        "scored_tokens": len(full.loss_N),
        "separator_density": density,
    }
    print(f"\n{path}: trained with {result['trained_with']}; {len(texts)} texts, {len(full.loss_N):,} tokens scored")
    result["full"] = report("full", "", full, full)
    result[f"SepLLM, n={options.window}"] = report(f"SepLLM, n={options.window}", "", own, full)
    for name, family in families(model.config, ids, density).items():
        number, policy = searched(family, own.retention.share, options.length, lambda policy: run(policy, texts[:4]))
        result[name] = report(name, str(number), run(policy, texts), full)
    return result


def report(name: str, number: str, found: Score, full: Score) -> dict[str, Any]:
    """Print a row and give it back."""
    row = {
        "number": number,
        "share": found.retention.share,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "above_full": found.loss - full.loss,
        "error": found.error_of_difference(full),
    }
    print(
        f"{name:46s} {number:>5s}  kept {row['share']:6.2%}  perplexity {row['perplexity']:8.2f}  "
        f"loss above full {row['above_full']:+.4f} +- {row['error']:.4f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument(
        "--books", type=Path, required=True, help="directory of *.txt, the test set of PG19 for example"
    )
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--prompt", type=int, default=1792)
    parser.add_argument("--per-book", type=int, default=1)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = [compare(path, options) for path in options.checkpoints]
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

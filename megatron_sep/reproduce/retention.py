"""Shares of kept keys in Tables 1, 9 and 17, which follow from a rule and the length of the prompts alone."""

from statistics import fmean

import torch

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.reproduce.item import Inputs, Result, Row, Table

GSM8K_TOKENS = round(259 / 0.2600)
"""Mean length that Table 1 implies: StreamingLLM with a=3, n=256 keeps 259 tokens, 26.00 %."""
MMLU_TOKENS = 688
"""Mean length at which the four rows of Table 9 agree best."""
HEADS = 32
"""Of Llama-3-8B."""


def kept_share(pattern: AttentionPattern, tokens: int) -> float:
    """Share of a text of so many tokens that its last token sees; no token is a separator."""
    return int(pattern.plan(torch.zeros(1, tokens, dtype=torch.int64)).num_visible()[0, -1]) / tokens


def table1(inputs: Inputs) -> Result:
    """r.KV of the rows without separators, at one length a task."""
    del inputs
    strm = {n: AttentionPattern(n, 3) for n in (256, 380)}
    short = "prompts shorter than 383 tokens keep all they have"
    rows = (
        Row("GSM8K, StrmLLM n=256", 100 * kept_share(strm[256], GSM8K_TOKENS), 26.00, "sets the length"),
        Row(
            "GSM8K, StrmLLM n=380",
            100 * kept_share(strm[380], GSM8K_TOKENS),
            47.54,
            "the paper's two rows have other denominators; the authors' log says 38.36",
        ),
        Row("MMLU, StrmLLM n=256", 100 * kept_share(strm[256], MMLU_TOKENS), 37.73, "length of Table 9"),
        Row("MMLU, StrmLLM n=380", 100 * kept_share(strm[380], MMLU_TOKENS), 52.50, short),
    )
    lengths = f"Mean lengths: {GSM8K_TOKENS} tokens of GSM8K-CoT, {MMLU_TOKENS} of MMLU."
    return Result((Table("r.KV (%)", rows),), (lengths,))


def table9(inputs: Inputs) -> Result:
    """r.KV where some heads have a window and the others see everything."""
    del inputs
    published = ((20, 80, 44.74), (24, 208, 47.71), (28, 256, 45.13), (30, 288, 45.42))
    rows = []
    for narrow, window, paper in published:
        heads = [AttentionPattern(window)] * narrow + [AttentionPattern()] * (HEADS - narrow)
        share = fmean(kept_share(pattern, MMLU_TOKENS) for pattern in heads)
        rows.append(Row(f"{narrow}/{HEADS} heads, n={window}", 100 * share, paper, "prompts differ in length"))
    return Result((Table("r.KV (%)", tuple(rows)),), (f"All four fit one mean length: {MMLU_TOKENS} tokens of MMLU.",))


def table17(inputs: Inputs) -> Result:
    """r.KV of FixLLM on GSM8K-CoT."""
    del inputs
    rows = tuple(
        Row(
            f"GSM8K, FixLLM n=256, every {stride}th token",
            100 * kept_share(AttentionPattern(256, 3, stride=stride), GSM8K_TOKENS),
            paper,
            "another denominator than in Table 1" + (": the authors' log says 41.2" if stride == 5 else ""),
        )
        for stride, paper in ((5, 45.64), (4, 49.08))
    )
    return Result((Table("r.KV (%)", rows),), (f"At the {GSM8K_TOKENS} tokens that Table 1 implies.",))

"""Table 16: which separators are kept, training-free, on a model of one's own."""

import torch

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.separators import PAPER_SEPARATORS
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.evaluate.perplexity import score
from megatron_sep.generate.load import Loaded, load
from megatron_sep.parallel.device import current_device
from megatron_sep.reproduce.attention_mass import sources
from megatron_sep.reproduce.item import Inputs, Result, Row, Table
from megatron_sep.reproduce.streams import read_tokens

CHOICES = {
    "nine separators": tuple(PAPER_SEPARATORS),
    "four: . , ? ;": (".", ",", "?", ";"),
    "two: . ?": (".", "?"),
    "none (StrmLLM)": (),
}
"""The text has nine, four common ones, . and ?, and none; it does not say which four."""
WINDOW = 64


def table16(inputs: Inputs) -> Result:
    """Loss of the second half of sequences, beside that of everything kept, and the share of the keys."""
    tables: list[Table] = []
    for path, name in sources(inputs, "table16"):
        tables += _tables(load(path, current_device(), torch.float32), name, inputs)
    note = f"a=3, n={WINDOW}; the first half of each sequence is a prompt, the second is fed token by token."
    return Result(tuple(tables), (note, "The paper has GSM8K-CoT with n=256: nine, four, two and none, falling."))


def _tables(loaded: Loaded, name: str, inputs: Inputs) -> list[Table]:
    length = loaded.trained_length
    tokens = max(1, inputs.tokens // length) * length
    ids = read_tokens(inputs.text, loaded.tokenizer, tokens, "table16").view(-1, length).to(loaded.model.device)
    full = score(loaded.model, AttentionPattern(), ids, length // 2)
    shares, above = [], []
    for choice, texts in CHOICES.items():
        found = score(loaded.model, AttentionPattern(WINDOW, 3, separator_ids(loaded, texts)), ids, length // 2)
        shares.append(Row(choice, 100 * found.retention.share))
        error = found.error_of_difference(full)
        above.append(Row(choice, found.loss - full.loss, None, f"standard error {error:.4f}"))
    return [
        Table(f"{name}: share of the keys that is kept (%)", tuple(shares)),
        Table(f"{name}: loss above full attention (nats per token)", tuple(above), 4),
    ]


def separator_ids(loaded: Loaded, texts: tuple[str, ...]) -> tuple[int, ...]:
    """The tokens of these texts."""
    return loaded.rules(AttentionConfig(window=1, separators=texts)).separators.separator_ids

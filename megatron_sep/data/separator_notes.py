"""What the separators of a run hold and miss of its data, in a line."""

from itertools import islice

from megatron_sep.attention.cut import Cut, measure
from megatron_sep.attention.separator_lists import LISTS
from megatron_sep.attention.separators import PAPER_SEPARATORS, merged_separators, separator_texts
from megatron_sep.config.schema import AttentionConfig, DataConfig
from megatron_sep.data.instructions import Instructions
from megatron_sep.data.open_data import open_data
from megatron_sep.data.resolved import Resolved
from megatron_sep.data.samples import Samples
from megatron_sep.data.tokenizer import Tokenizer

MEASURED = 1 << 16
"""Tokens of the training data that are looked at."""
NUM_EXAMPLES = 256
"""Instructions that are looked at before a run."""


def separator_notes(attention: AttentionConfig, resolved: Resolved, samples: Samples) -> list[str]:
    """Of the first samples that are trained on; nothing where a run has no separators. Raises DataError."""
    separators, tokenizer = resolved.rules.separators.separator_ids, resolved.tokenizer
    if not separators:
        return []
    texts = separator_texts(attention) or PAPER_SEPARATORS
    documents = _first_rows(samples)
    cut = measure(documents, separators, tokenizer, texts)
    more = measure(documents, {*separators, *merged_separators(tokenizer, texts)}, tokenizer, texts)
    return [*_strange(attention, tokenizer), _in_words(cut, more, tokenizer)]


def shown_samples(data: DataConfig, sequence_length: int, tokenizer: Tokenizer) -> Samples:
    """Samples of the training data that are quickly at hand, which a run's order and all its instructions are not.

    Raises as ``open_data``.
    """
    if data.instructions is not None:
        return Instructions(
            data.instructions, tokenizer, sequence_length, seed=data.seed, shuffle=False, part=slice(0, NUM_EXAMPLES)
        )
    return open_data(data.model_copy(update={"order": "samples"}), "train", sequence_length, tokenizer, 1)


def _first_rows(samples: Samples) -> list[list[int]]:
    rows, tokens = [], 0
    for number in range(samples.num_samples):
        rows.append(samples.take(number, 1).ids[0, :-1].tolist())
        tokens += len(rows[-1])
        if tokens >= MEASURED:
            break
    return rows


def _in_words(cut: Cut, more: Cut, tokenizer: Tokenizer) -> str:
    said = (
        f"separators: {cut.density:.1%} of {cut.tokens:,} tokens of the training data; {1 - cut.coverage:.1%} of the "
        "separating characters stand in a token that is none"
    )
    if not cut.missed:
        return said
    most = ", ".join(repr(tokenizer.decode([token])) for token in islice(cut.missed, 4))
    better = f"; {1 - more.coverage:.1%} with `merged: true`" if more.coverage > cut.coverage else ""
    return f"{said}, most in {most}{better}"


def _strange(attention: AttentionConfig, tokenizer: Tokenizer) -> list[str]:
    """What a list of the authors' holds that is no separator."""
    asked = attention.separators
    if not isinstance(asked, str) or asked == "default":
        return []
    return [
        f"attention.separators={asked}: {number} is {text!r}, which begins, ends or fills up texts and separates "
        "nothing; it is in the authors' list, and stays visible as the others do"
        for number, text in LISTS[asked].texts.items()
        if number in tokenizer.special_ids
    ]

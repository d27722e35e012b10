"""Which tokens of a tokenizer are separators, and how a text is cut by them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml

from megatron_sep.attention.cut import measure
from megatron_sep.attention.separators import (
    PAPER_SEPARATORS,
    SeparatorError,
    chosen_separators,
    merged_separators,
    separator_ids,
)
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.config.separators import ListName, SeparatorsConfig
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer

SPARSE = 0.03
"""Below this share the text has spaces before its marks, which then hide in tokens such as ` .` and ` ,`."""


def attention_of(merged: bool, named: str | None, more: Sequence[int]) -> AttentionConfig:
    """What the options of the verb say, as a configuration does. Raises SeparatorError."""
    if named is None:
        separators = SeparatorsConfig(texts="default", merged=True) if merged else "default"
        return AttentionConfig(separators=separators, separator_ids=tuple(more))
    if named not in get_args(ListName):
        raise SeparatorError(f"--list {named}: no such list; there are {', '.join(get_args(ListName))}")
    if merged:
        raise SeparatorError(f"--merged: is not of a list; leave out --list {named}, or --merged")
    return AttentionConfig.model_validate({"separators": named, "separator_ids": tuple(more)})


def describe_separators(path: Path, text: Path | None, attention: AttentionConfig, eod: str | None = None) -> str:
    """The choice in words, ready for a configuration. ``eod`` as ``load_tokenizer`` takes it. Raises SeparatorError."""
    tokenizer = load_tokenizer(path, eod)
    chosen = chosen_separators(attention, tokenizer)
    nine = separator_ids(PAPER_SEPARATORS, tokenizer)
    other = merged_separators(tokenizer)
    named = ", ".join(f"{separator!r}" for separator in PAPER_SEPARATORS)
    examples = ", ".join(f"{number} {spelling!r}" for number, spelling in list(other.items())[:8])
    lines = [
        f"{named}: {list(nine)}",
        f"merged ones, added by --merged: {len(other)}{f' ({examples} ...)' if other else ''}",
        f"attention: {_in_yaml(attention)}",
    ]
    if text is not None:
        lines += _measured(text, chosen, tokenizer)
    return "\n".join(lines)


def _in_yaml(attention: AttentionConfig) -> str:
    chosen = attention.model_dump(mode="json", include={"separators", "separator_ids"}, exclude_defaults=True)
    return yaml.safe_dump(chosen, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def _measured(text: Path, ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SeparatorError(f"{text}: cannot be read: {error}") from error
    cut = measure([tokenizer.encode(content)], ids, tokenizer)
    lines = [
        f"{text}: {cut.tokens:,} tokens, density {cut.density:.2%}, coverage {cut.coverage:.1%}, "
        f"largest gap {cut.largest_gap} tokens"
    ]
    if cut.density < SPARSE:
        lines.append(
            f"warning: fewer than {SPARSE:.0%} of the tokens are separators; the text may be space-tokenised, so that "
            "its marks are tokens such as ' .' and ' ,': detokenise it, or add those with --merged"
        )
    return lines

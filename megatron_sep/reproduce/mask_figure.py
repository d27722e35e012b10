"""Figure 3: the mask of the paper's sentence, and what is kept of its keys and values."""

import torch

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.report.attention_map import draw_mask
from megatron_sep.report.picture import pyplot
from megatron_sep.reproduce.item import Inputs, Result, Row, Table

SENTENCE = "ABC,DE.FG\n"
"""A character is a token."""
SEPARATORS = ",.\n"
PATTERN = AttentionPattern(window=3, sinks=1, separator_ids=tuple(map(ord, SEPARATORS)))
"""The caption names neither a nor n; these are as small as lets every kind of key show."""


def plan() -> MaskPlan:
    """The rule on the sentence."""
    return PATTERN.plan(torch.tensor([[ord(character) for character in SENTENCE]]))


def figure3(inputs: Inputs) -> Result:
    """Keys that each token sees."""
    del inputs
    found = plan()
    labels = [character.replace("\n", "\\n") for character in SENTENCE]
    figure, axes = pyplot().subplots(figsize=(4.6, 4.6), layout="constrained")
    title = f"“ABC,DE.FG\\n”: a={PATTERN.sinks}, n={PATTERN.window}, separators , . \\n"
    draw_mask(axes, found, labels, title)
    kept = found.num_visible()[0].tolist()
    rows = tuple(Row(f"{label} sees", float(count)) for label, count in zip(labels, kept, strict=True))
    note = "Orange: first tokens and separators, seen by every later token. Blue: neighbours, seen by n queries."
    return Result((Table("Keys seen", rows, 0),), (note,), {"figure3": figure})

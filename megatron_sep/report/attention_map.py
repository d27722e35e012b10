"""Which tokens each token sees, drawn for a text under the pattern of every kind of layer."""

from pathlib import Path
from typing import Any

import torch

from megatron_sep.attention.pattern import AttentionPattern, MaskPlan
from megatron_sep.attention.words import in_words
from megatron_sep.config import RunConfig
from megatron_sep.data.resolved import resolve
from megatron_sep.report.picture import PictureError, check_format, pyplot, save

MOST_TOKENS = 300
HIDDEN, WINDOW, LANDMARK = "#f2f2f2", "#4c78a8", "#f58518"


def plot_masks(config: RunConfig, text: str, path: Path) -> None:
    """One panel for each pattern of the model: rows are queries, columns keys, landmarks in a colour of their own.

    Raises PictureError for another suffix than a picture's and for a text of no tokens or too many.
    """
    check_format(path)
    resolved = resolve(config.tokenizer, config.model, config.attention)
    tokenizer, rules = resolved.tokenizer, resolved.rules
    ids = tokenizer.encode(text)
    if not 0 < len(ids) <= MOST_TOKENS:
        raise PictureError(f"--text: has {len(ids)} tokens; the picture is of 1 to {MOST_TOKENS}, a row each")
    labels = [tokenizer.decode([i]).replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣") for i in ids]
    panels = dict(zip(rules.patterns, rules.plans(torch.tensor([ids])), strict=True))
    side = 1.5 + 0.22 * len(ids)
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(side * len(panels), side), layout="constrained", squeeze=False
    )
    for axis, (pattern, plan) in zip(axes[0], panels.items(), strict=True):
        draw_mask(axis, plan, labels, _title(rules.patterns, pattern))
    save(figure, path, dpi=130, bbox_inches="tight")


def _title(patterns: tuple[AttentionPattern, ...], pattern: AttentionPattern) -> str:
    layers = [str(number) for number, other in enumerate(patterns) if other == pattern]
    seen = in_words(pattern).split(" (ids")[0].replace(", ", ",\n", 1)
    return f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}: {seen}"


def draw_mask(axis: Any, plan: MaskPlan, labels: list[str], title: str) -> None:
    """Queries by keys of the first row: what is seen, landmarks in their own colour; ``labels`` are of the tokens."""
    from matplotlib.colors import ListedColormap

    seen_TT = plan.dense()[0].int()
    colour_TT = seen_TT * (1 + plan.landmark_BT[0].int()[None, :])
    axis.imshow(colour_TT.numpy(), cmap=ListedColormap([HIDDEN, WINDOW, LANDMARK]), vmin=0, vmax=2)
    ticks = range(len(labels))
    axis.set_xticks(ticks, labels, rotation=90, family="monospace", fontsize=8)
    axis.set_yticks(ticks, labels, family="monospace", fontsize=8)
    axis.set_xticks([t - 0.5 for t in ticks], minor=True)
    axis.set_yticks([t - 0.5 for t in ticks], minor=True)
    axis.grid(which="minor", color="white", linewidth=1)
    axis.tick_params(which="both", length=0)
    axis.set_xlabel("key")
    axis.set_ylabel("query")
    axis.set_title(title, fontsize=9, loc="left")

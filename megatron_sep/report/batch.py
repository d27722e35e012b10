"""What was in a step: its documents and text, and which tokens each position could see under each layer's pattern."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_sep.config.schema import RunConfig
from megatron_sep.data.open_data import open_data
from megatron_sep.data.resolved import resolve
from megatron_sep.data.samples import DataError, Origin
from megatron_sep.train.written import consumed_before

if TYPE_CHECKING:
    from rich.text import Text

    from megatron_sep.attention.pattern import MaskPlan
    from megatron_sep.attention.rules import LayerRules


@dataclass(frozen=True)
class LayerView:
    """What one pattern lets a sample see, asked of its mask plan."""

    layers: tuple[int, ...]
    """The layers that have this pattern."""
    landmark: list[bool]
    """Tokens that stay visible after they leave the window."""
    visible: list[int]
    """Tokens that each position sees."""
    plan: "MaskPlan"

    def sees(self, position: int) -> list[int]:
        """The tokens that ``position`` sees. Raises DataError for a position that is not there."""
        import torch

        if not 0 <= position < len(self.visible):
            raise DataError(f"position {position}: the sample has positions 0 to {len(self.visible) - 1}")
        row = self.plan.visible(torch.tensor(0), torch.tensor(position), torch.arange(position + 1))
        return [int(token) for token in row.nonzero().flatten()]


@dataclass(frozen=True)
class SampleView:
    """One sample: ``ids`` are the model's input, T tokens; the target of each is the token after it."""

    sample: int
    """Counted from the start of the run."""
    ids: list[int]
    tokens: list[str]
    origins: Sequence[Origin]
    layers: list[LayerView]
    separators: frozenset[int]
    """Ids."""
    learnt: list[bool] | None = None
    """Whether the loss counts each token; None: it counts all."""
    notes: tuple[str, ...] = ()
    """What became of the data when it was opened."""


def view_step(config: RunConfig, step: int, rows: Sequence[int] = (0,)) -> list[SampleView]:
    """Samples ``rows`` of the global batch of ``step``; steps count from 1, rows from 0.

    Raises DataError for a step or row that the run does not have, and what opening the data raises.
    """
    size = config.train.global_batch_size
    wrong = [row for row in rows if not 0 <= row < size]
    if not 1 <= step <= config.train.steps or wrong:
        raise DataError(
            f"step {step}, rows {list(rows)}: the run has steps 1 to {config.train.steps} of rows 0 to {size - 1}"
        )
    resolved = resolve(config.tokenizer, config.model, config.attention)
    tokenizer, rules = resolved.tokenizer, resolved.rules
    samples = open_data(config.data, "train", config.model.sequence_length, tokenizer, config.train.steps * size)
    separators = frozenset(i for pattern in rules.patterns for i in pattern.separator_ids)
    found = []
    first = consumed_before(config.dir, step, size)
    for index in (first + row for row in rows):
        (row_ids,), weights = samples.take(index, 1)
        ids = row_ids[:-1].tolist()
        found.append(
            SampleView(
                index,
                ids,
                [tokenizer.decode([i]) for i in ids],
                samples.origins(index),
                _layers(rules, ids),
                separators,
                None if weights is None else (weights[0, :-1] > 0).tolist(),
                tuple(samples.notes()),
            )
        )
    return found


def to_json(views: Sequence[SampleView], position: int | None = None) -> str:
    """Everything of the samples as JSON; ``position``: with the tokens that it sees, in each layer."""
    return json.dumps([_as_dict(view, position) for view in views], ensure_ascii=False)


def to_text(view: SampleView, position: int | None = None) -> "Text":
    """The sample as marked text: documents, then the tokens, separators underlined on blue and sinks on magenta.

    Where the loss does not count all of them, those that it counts are green. With a ``position``, once for each
    pattern with what that position does not see dimmed.
    """
    from rich.text import Text

    text = Text(f"sample {view.sample}\n", style="bold")
    for note in view.notes:
        text.append(f"  {note}\n")
    for origin in view.origins:
        text.append(f"  {origin}: {origin.tokens} tokens\n", style="cyan")
    for number, layer in enumerate(view.layers):
        if position is None and number:
            break
        share = sum(layer.visible) / (len(view.ids) * (len(view.ids) + 1) / 2)
        if position is not None:
            what = f"position {position} sees {len(layer.sees(position))} of {position + 1} tokens, "
            text.append(f"layers {_ranges(layer.layers)}: {what}{share:.1%} of the map\n", style="bold")
        _append_tokens(text, view, layer, position)
    if position is None:
        for layer in view.layers:
            share = sum(layer.visible) / (len(view.ids) * (len(view.ids) + 1) / 2)
            text.append(f"layers {_ranges(layer.layers)}: {share:.1%} of the lower triangle is visible\n", style="bold")
    return text


def _append_tokens(text: "Text", view: SampleView, layer: LayerView, position: int | None) -> None:
    sees = set(range(len(view.ids)) if position is None else layer.sees(position))
    for column, (token, i) in enumerate(zip(view.tokens, view.ids, strict=True)):
        separator, landmark = i in view.separators, any(other.landmark[column] for other in view.layers)
        style = "underline on blue" if separator else "on magenta" if landmark else ""
        if view.learnt is not None and view.learnt[column]:
            style = f"green {style}".strip()
        if column == position:
            style = "reverse bold"
        elif column not in sees:
            style = f"{style} dim strike".strip()
        text.append(token.replace("\n", "⏎\n").replace("\t", "⇥") if separator else token, style=style)
    text.append("\n")


def _layers(rules: "LayerRules", ids: list[int]) -> list[LayerView]:
    """One view a distinct pattern, asked of the pattern's own plan."""
    import torch

    plans = rules.plans(torch.tensor([ids]))
    members = {p: tuple(i for i, other in enumerate(rules.patterns) if other == p) for p in rules.patterns}
    chosen = [(layers, plans[layers[0]]) for layers in members.values()]
    return [
        LayerView(layers, plan.landmark_BT[0].tolist(), plan.num_visible()[0].tolist(), plan) for layers, plan in chosen
    ]


def _as_dict(view: SampleView, position: int | None) -> dict[str, Any]:
    layers: list[dict[str, Any]] = [
        {
            "layers": layer.layers,
            "landmark": layer.landmark,
            "visible": layer.visible,
            "reach": layer.plan.reach_BT[0].tolist(),
        }
        for layer in view.layers
    ]
    for layer, value in zip(view.layers, layers, strict=True):
        if position is not None:
            value["sees"] = {"position": position, "tokens": layer.sees(position)}
    return {
        "sample": view.sample,
        "documents": [origin.record() for origin in view.origins],
        "ids": view.ids,
        "tokens": view.tokens,
        "separators": [i for i, token in enumerate(view.ids) if token in view.separators],
        "notes": view.notes,
        "learnt": None if view.learnt is None else [i for i, learnt in enumerate(view.learnt) if learnt],
        "layers": layers,
    }


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 7."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)

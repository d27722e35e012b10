"""What was in a step: its documents and text, and which tokens each position could see under each layer's pattern."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_sep.attention.separators import PAPER_SEPARATORS, separator_ids
from megatron_sep.config.schema import RunConfig
from megatron_sep.data.batches import DataError, Span
from megatron_sep.data.open import open_samples
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from rich.text import Text

    from megatron_sep.attention.pattern import AttentionPattern


@dataclass(frozen=True)
class LayerView:
    """What one pattern lets a sample see, from its mask plan."""

    layers: tuple[int, ...]
    """The layers that have this pattern."""
    landmark: list[bool]
    """Tokens that stay visible after they leave the window."""
    reach: list[int]
    """Token j is seen by the positions j <= i < j + reach[j]."""
    visible: list[int]
    """Tokens that each position sees."""

    def sees(self, position: int) -> list[int]:
        """The tokens that ``position`` sees."""
        return [j for j in range(position + 1) if position < j + self.reach[j]]


@dataclass(frozen=True)
class SampleView:
    """One sample: ``ids`` are the model's input, T tokens; the target of each is the token after it."""

    sample: int
    """Counted from the start of the run."""
    ids: list[int]
    tokens: list[str]
    spans: list[Span]
    layers: list[LayerView]
    separators: frozenset[int]
    sinks: int


def view_step(config: RunConfig, step: int, rows: Sequence[int] = (0,)) -> list[SampleView]:
    """Samples ``rows`` of the global batch of ``step``; steps count from 1.

    Raises DataError for a step or row that the run does not have, and what opening the data raises.
    """
    size = config.train.global_batch_size
    wrong = [row for row in rows if not 0 <= row < size]
    if not 1 <= step <= config.train.steps or wrong:
        raise DataError(
            f"step {step}, rows {list(rows)}: the run has steps 1 to {config.train.steps} of rows 0 to {size - 1}"
        )
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod)
    length = config.model.sequence_length
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    samples = open_samples(config.data, "train", length, vocab_size, config.train.steps * size)
    patterns = _patterns(config, tokenizer)
    found = []
    for index in ((step - 1) * size + row for row in rows):
        ids = samples.sample(index)[:-1].tolist()
        stream, start = samples.places(index)
        found.append(
            SampleView(
                index,
                ids,
                [tokenizer.decode([i]) for i in ids],
                stream.spans(start, start + length),
                _layers(config, patterns, ids, tokenizer.eod_id),
                frozenset(patterns[-1].separator_ids) | frozenset(i for p in patterns for i in p.separator_ids),
                max(pattern.sinks for pattern in patterns),
            )
        )
    return found


def to_json(views: Sequence[SampleView], position: int | None = None) -> str:
    """Everything of the samples as JSON; ``position``: with the tokens that it sees, in each layer."""
    return json.dumps([_as_dict(view, position) for view in views], ensure_ascii=False)


def to_text(view: SampleView, position: int | None = None) -> "Text":
    """The sample as marked text: documents, then the tokens, separators underlined on blue and sinks on magenta.

    With a ``position``, once for each pattern with what that position does not see dimmed.
    """
    from rich.text import Text

    text = Text(f"sample {view.sample}\n", style="bold")
    for span in view.spans:
        text.append(f"  {span}: {span.tokens} tokens\n", style="cyan")
    for number, layer in enumerate(view.layers):
        if position is None and number:
            break
        share = sum(layer.visible) / (len(view.ids) * (len(view.ids) + 1) / 2)
        if position is not None:
            what = f"position {position} sees {layer.visible[position]} of {position + 1} tokens, "
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
        if column == position:
            style = "reverse bold"
        elif column not in sees:
            style = f"{style} dim strike".strip()
        text.append(token.replace("\n", "⏎\n").replace("\t", "⇥") if separator else token, style=style)
    text.append("\n")


def _patterns(config: RunConfig, tokenizer: Tokenizer) -> "tuple[AttentionPattern, ...]":
    from megatron_sep.attention.layers import layer_patterns
    from megatron_sep.attention.pattern import AttentionPattern

    section = config.attention
    texts = PAPER_SEPARATORS if section.separators == "default" else section.separators
    pattern = AttentionPattern(section.window, section.sinks, separator_ids(texts, tokenizer), section.stride)
    return layer_patterns(pattern, config.model.num_layers, section.full_layers)


def _layers(config: RunConfig, patterns: "Sequence[AttentionPattern]", ids: list[int], eod_id: int) -> list[LayerView]:
    """One view a distinct pattern, asked of the pattern's own plan."""
    import torch

    from megatron_sep.attention.layers import plan_layers
    from megatron_sep.attention.pattern import document_numbers

    ids_BT = torch.tensor([ids])
    documents_BT = document_numbers(ids_BT, eod_id) if config.attention.document_boundaries else None
    plans = plan_layers(patterns, ids_BT, documents_BT)
    members = {pattern: tuple(i for i, p in enumerate(patterns) if p == pattern) for pattern in patterns}
    chosen = [(layers, plans[layers[0]]) for layers in members.values()]
    return [
        LayerView(layers, plan.landmark_BT[0].tolist(), plan.reach_BT[0].tolist(), plan.num_visible()[0].tolist())
        for layers, plan in chosen
    ]


def _as_dict(view: SampleView, position: int | None) -> dict[str, Any]:
    documents = [
        {"index": str(s.shard.index_path), "document": s.document, "offset": s.offset, "tokens": s.tokens}
        for s in view.spans
    ]
    layers: list[dict[str, Any]] = [vars(layer).copy() for layer in view.layers]
    for layer, value in zip(view.layers, layers, strict=True):
        if position is not None:
            value["sees"] = {"position": position, "tokens": layer.sees(position)}
    return {
        "sample": view.sample,
        "documents": documents,
        "ids": view.ids,
        "tokens": view.tokens,
        "separators": [i for i, token in enumerate(view.ids) if token in view.separators],
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

"""Figures 2 and 12 to 14: attention maps with their separators, and what each layer pays to each kind of key."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.attention.key_kinds import KeyKinds, counted_separators
from megatron_sep.attention.pattern import is_separator
from megatron_sep.generate.load import Loaded, load
from megatron_sep.generate.watched import attention_weights
from megatron_sep.parallel.device import current_device
from megatron_sep.report.picture import labelled, pyplot
from megatron_sep.reproduce.item import Inputs, Make, ReproduceError, Result, Row, Table
from megatron_sep.reproduce.runs import find_runs

TEXT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May? Answer Natalia sold 48 clips in April. In May, she sold half as many "
    "clips as she did in April, so she sold 48/2=24 clips in May. Therefore, Natalia sold a total of 48+24=72 clips in "
    "April and May. The answer is [72]."
)
"""The paper's, of its appendix A."""
SINKS, WINDOW = 3, 8
"""First and neighbouring keys that are counted as such; the text is too short for the window of a model."""
KINDS = ("first tokens", "separators", "neighbours", "other tokens")
_COLOURS = ("#54a24b", "#f58518", "#4c78a8", "#d9d9d9")


@dataclass(frozen=True)
class Maps:
    """Of one model on the text."""

    name: str
    weights: Sequence[Tensor]
    """fp32 [H, T, T] a layer."""
    separator_T: Tensor
    """bool"""


def maps_of(path: Path, name: str) -> Maps:
    """Attention of a checkpoint, a run or a Hugging Face directory under the pattern it was trained with."""
    loaded = load(path, current_device(), torch.float32)
    ids = torch.tensor([loaded.tokenizer.encode(TEXT)[: loaded.trained_length]])
    rules = loaded.rules()
    weights = attention_weights(loaded.model, list(rules.patterns), ids)
    separators = separators_of(loaded)
    return Maps(name, [layer[0] for layer in weights], is_separator(ids, separators)[0])


def separators_of(loaded: Loaded) -> tuple[int, ...]:
    """The model's own, or the paper's where it has none."""
    return counted_separators(loaded.attention, loaded.tokenizer)


def mass(weights_HTT: Tensor, separator_T: Tensor) -> dict[str, float]:
    """Share of the attention that each kind of key gets, mean over heads and over queries behind the window.

    A key is of the first kind that it fits: first tokens, separators, neighbours, others. The shares add up to 1.
    """
    tokens = weights_HTT.shape[-1]
    place_1T = torch.arange(tokens)[None]
    paid = KeyKinds(SINKS, WINDOW).paid(weights_HTT[None], place_1T, separator_T[None], range(tokens))
    return dict(zip(KINDS, (paid[:-1] / paid[-1]).tolist(), strict=True))


def sources(inputs: Inputs, item: str) -> list[tuple[Path, str]]:
    """The checkpoints that were named, or the runs of the folder. Raises ReproduceError for neither."""
    if inputs.checkpoints:
        return [(path, path.name) for path in inputs.checkpoints]
    if inputs.runs is None:
        raise ReproduceError(f"{item}: pass --checkpoint PATH, or --runs DIR to look at each run below it")
    return [(run.dir, run.label) for run in find_runs(inputs.runs) if not run.post_trained]


def figure2(inputs: Inputs) -> Result:
    """Attention paid to first tokens, separators, neighbours and the rest in each layer, and to how many keys."""
    found = [maps_of(path, name) for path, name in sources(inputs, "figure2")]
    figure, axes = pyplot().subplots(
        1, len(found), figsize=(2.4 + 3.4 * len(found), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    tables = []
    for axis, maps in zip(axes[0], found, strict=True):
        masses = [mass(weights, maps.separator_T) for weights in maps.weights]
        _bars(axis, masses, maps.name)
        density = float(maps.separator_T.double().mean())
        rows = tuple(Row(f"layer {i}", 100 * each["separators"]) for i, each in enumerate(masses))
        tables.append(Table(f"{maps.name}: attention paid to separators, {density:.1%} of the tokens (%)", rows, 1))
    axes[0, 0].set_ylabel("share of the attention")
    handles, names = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    note = f"First tokens: {SINKS}. Neighbours: the last {WINDOW} tokens. Queries behind those, mean over heads."
    return Result(tuple(tables), (note,), {"figure2": figure})


def _bars(axis: Any, masses: Sequence[dict[str, float]], title: str) -> None:
    layers, below = range(len(masses)), [0.0] * len(masses)
    for kind, colour in zip(KINDS, _COLOURS, strict=True):
        heights = [each[kind] for each in masses]
        axis.bar(layers, heights, bottom=below, color=colour, width=0.85, label=kind)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axis.set_ylim(0, 1)
    axis.set_xticks([layer for layer in layers if layer % max(1, len(masses) // 6) == 0])
    axis.set_xlabel("layer")
    axis.set_title(title, loc="left", fontsize=10)


def head_map(name: str, layer: int) -> Make:
    """Makes the map of the first head of a layer, separators marked on the axis of the keys."""

    def make(inputs: Inputs) -> Result:
        figures = {}
        for path, label in sources(inputs, name):
            maps = maps_of(path, label)
            if layer >= len(maps.weights):
                raise ReproduceError(f"{name}: {path} has {len(maps.weights)} layers, and this is of layer {layer}")
            figures[f"{name}-{path.name}"] = _picture(maps, layer)
        return Result(notes=("Orange lines mark the keys that are separators.",), figures=figures)

    return make


def _picture(maps: Maps, layer: int) -> Any:
    figure, axes = pyplot().subplots(figsize=(6.4, 5.6), layout="constrained")
    weights_TT = maps.weights[layer][0].sqrt()
    image = axes.imshow(weights_TT.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    for place in maps.separator_T.nonzero()[:, 0].tolist():
        axes.plot([place, place], [place, len(weights_TT) - 1], color="#f58518", linewidth=0.8, alpha=0.5)
    labelled(axes, "key (token)", "query (token)", f"{maps.name}: layer {layer}, head 0")
    axes.grid(visible=False)
    figure.colorbar(image, label="square root of the attention weight", shrink=0.8)
    return figure

"""Table 3: which share of the attention map is visible, and what training costs beside full attention."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config.schema import ModelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.reproduce.item import Inputs, Result, Row, Table
from megatron_sep.reproduce.runs import comparison

MODEL = ModelConfig(vocab_size=50304)
"""Pythia-160m."""
_SEPARATOR = 1


@dataclass(frozen=True)
class Variant:
    """A column of the paper's Table 3, with its two numbers in percent."""

    name: str
    pattern: AttentionPattern
    full_layers: tuple[int, ...]
    flops: float
    attention: float


def sep(window: int) -> AttentionPattern:
    """SepLLM with the paper's three first tokens; every token of id 1 is a separator."""
    return AttentionPattern(window, 3, (_SEPARATOR,))


VARIANTS = (
    Variant("StrmLLM n=64", AttentionPattern(64, 3), (), 70.11, 6.43),
    Variant("SepLLM n=64", sep(64), (), 71.77, 17.21),
    Variant("SepLLM n=128", sep(128), (), 72.58, 22.48),
    Variant("SepLLM n=64, H", sep(64), (0,), 72.83, 24.11),
    Variant("SepLLM n=64, H/T", sep(64), (0, -1), 73.90, 31.01),
    Variant("Vanilla", AttentionPattern(), (), 100.0, 100.0),
)


def share(pattern: AttentionPattern, density: float, length: int = MODEL.sequence_length) -> float:
    """Share of the lower triangle that is visible where each token is a separator with probability ``density``.

    Its mean over texts is linear in the density: each key counts for itself.
    """
    none, all_of_them = (float(pattern.plan(torch.full((1, length), token)).map_share()) for token in (0, _SEPARATOR))
    return (1 - density) * none + density * all_of_them


def density_of(pattern: AttentionPattern, measured: float, length: int = MODEL.sequence_length) -> float:
    """The density of separators at which ``pattern`` shows so large a share."""
    least = share(pattern, 0, length)
    return (measured - least) / (share(pattern, 1, length) - least)


def layers_share(variant: Variant, density: float) -> float:
    """Mean over the layers of Pythia-160m."""
    return fmean(share(p, density) for p in layer_patterns(variant.pattern, MODEL.num_layers, variant.full_layers))


@dataclass(frozen=True)
class Convention:
    """A way to count the operations of a training step."""

    name: str
    size: ModelSize
    """Without a vocabulary, the output layer costs nothing."""
    vanilla_pairs: float
    """(query, key) pairs that full attention is charged for, as a share of those below the diagonal."""

    def relative(self, visible: float) -> float:
        """Operations beside those of full attention, where ``visible`` of the triangle is computed."""
        length = self.size.config.sequence_length
        triangle = self.size.config.num_layers * length * length / 2
        return self.size.training_flops(length, visible * triangle) / self.size.training_flops(
            length, self.vanilla_pairs * triangle
        )


def conventions(config: ModelConfig = MODEL, vocab_size: int = 50304) -> tuple[Convention, ...]:
    """The paper's, and two that charge full attention for what a causal kernel computes."""
    bare, whole = ModelSize(config, 0), ModelSize(config, vocab_size)
    return (
        Convention("full attention charged for all T x T pairs, no output layer (the paper's)", bare, 2.0),
        Convention("full attention charged for its triangle, no output layer", bare, 1.0),
        Convention("full attention charged for its triangle, with the output layer", whole, 1.0),
    )


def table3(inputs: Inputs) -> Result:
    """Shares and operations of the paper's six models, and of runs where there are some."""
    density = density_of(sep(64), VARIANTS[1].attention / 100)
    shares = {variant.name: layers_share(variant, density) for variant in VARIANTS}
    why = {
        "StrmLLM n=64": "has no separators: a=3 and a window that counts the query give it",
        "SepLLM n=64": f"sets the density of separators: {density:.3%} of the Pile's tokens",
    }
    attention = tuple(
        Row(v.name, 100 * shares[v.name], v.attention, why.get(v.name, "follows from that density")) for v in VARIANTS
    )
    return Result(
        (
            Table("Visible share of the attention map (%)", attention),
            *(_flops(convention, shares, i == 0) for i, convention in enumerate(conventions())),
            *([] if inputs.runs is None else of_runs(inputs.runs)),
        ),
        (
            "The paper's saving of 28 % charges full attention for the pairs above the diagonal, which no causal "
            "kernel computes, and leaves out the output layer, 31 % of the matrix products at this size.",
        ),
    )


def _flops(convention: Convention, shares: dict[str, float], of_paper: bool) -> Table:
    rows = tuple(
        Row(v.name, 100 * (1.0 if v.name == "Vanilla" else convention.relative(shares[v.name])), v.flops if of_paper
            else None, "" if v.name == "Vanilla" or not of_paper else "not explained; within 0.12 for every column")
        for v in VARIANTS
    )  # fmt: skip
    return Table(f"FLOPs (%): {convention.name}", rows)


def of_runs(folder: Path) -> list[Table]:
    """What the runs of a folder saw of their text, and their operations by the same conventions."""
    runs = comparison(folder).all
    paper = {variant.name: variant for variant in VARIANTS}
    seen = {run.label: run.mean("attention/visible") for run in runs}
    rows = []
    for run in runs:
        density, variant = run.mean("attention/separator_density"), paper.get(run.label)
        why = f"{density:.1%} of the tokens are separators here" if density else ""
        rows.append(Row(run.label, 100 * seen[run.label], variant.attention if variant else None, why))
    tables = [Table("Runs: visible share of the attention map (%)", tuple(rows))]
    config, vocab_size = runs[0].config.model, runs[0].description.vocab_size
    for i, convention in enumerate(conventions(config, vocab_size)):
        costs = []
        for run in runs:
            cost = 100.0 if run is runs[0] else 100 * convention.relative(seen[run.label])
            published = paper[run.label].flops if i == 0 and run.label in paper else None
            other = published is not None and bool(run.mean("attention/separator_density"))
            costs.append(Row(run.label, cost, published, "another density" if other else ""))
        tables.append(Table(f"Runs: FLOPs (%), {convention.name}", tuple(costs)))
    return tables

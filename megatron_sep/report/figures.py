"""What a run is looked at by, on the page of `watch` and in the files of `plot`: figures and their axes."""

from dataclasses import dataclass

AXES = {
    "step": "step",
    "tokens": "tokens",
    "seconds": "seconds of training",
    "flops": "floating-point operations",
}
"""What figures are drawn against, with their names on the axis."""


@dataclass(frozen=True)
class Figure:
    """Some metrics of a run on one pair of axes."""

    name: str
    title: str
    unit: str
    metrics: dict[str, str]
    """Their names in metrics.jsonl, and what they are called in the figure."""
    factor: float = 1.0
    """From the logged number to the shown one."""
    settles: bool = False
    """Falls steeply at first: the axis is that of what comes after the first tenth, so that small differences show."""
    log: bool = False


_KINDS = {"first": "first tokens", "separators": "separators", "window": "window", "rest": "the rest"}


def _mass(group: str, title: str) -> Figure:
    """What a group of layers pays to each kind of key."""
    metrics = {f"attention/mass/{group}/{kind}": name for kind, name in _KINDS.items()}
    return Figure(f"mass_{group}", title, "% of the attention", metrics, factor=100)


FIGURES = (
    Figure("loss", "Loss", "nats per token", {"train/loss": "training", "valid/loss": "validation"}, settles=True),
    Figure("lr", "Learning rate", "", {"train/lr": ""}),
    Figure("grad_norm", "Gradient norm", "before clipping", {"train/grad_norm": ""}, settles=True, log=True),
    Figure("tokens", "Tokens per second", "tokens/s", {"speed/tokens_per_second": ""}),
    Figure("mfu", "MFU", "% of the peak", {"speed/mfu": ""}, factor=100),
    Figure("visible", "Visible pairs", "% of the causal map", {"attention/visible": ""}, factor=100),
    Figure("separators", "Separator density", "% of the tokens", {"attention/separator_density": ""}, factor=100),
    _mass("sep", "What Sep layers attend to"),
    _mass("full", "What full layers attend to"),
)
METRICS = tuple(name for figure in FIGURES for name in figure.metrics)

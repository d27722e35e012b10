"""Table 10: time of a training step and sequences a second, beside vanilla's."""

from megatron_sep.reproduce.item import Inputs, Result, Row, Table
from megatron_sep.reproduce.runs import comparison

STEP_MS = {"Vanilla": 2524.45, "SepLLM n=64": 1648.11, "SepLLM n=128": 1653.11}
SEQUENCES = {"Vanilla": 405.82, "SepLLM n=64": 622.31, "SepLLM n=128": 620.30}
"""The paper's, a second."""
_OTHER = "another GPU and batch"
_FUSED = "the paper's vanilla had no fused attention"


def table10(inputs: Inputs) -> Result:
    """Medians over the status lines of each run."""
    found = comparison(inputs.folder("table10"))
    seconds = {run: run.step_seconds for run in found.all}
    steps, rates, ratios = [], [], []
    vanilla = seconds[found.vanilla]
    for run, each in seconds.items():
        paper, size = SEQUENCES.get(run.label), run.config.train.global_batch_size
        steps.append(Row(run.label, 1000 * each, STEP_MS.get(run.label), _OTHER))
        rates.append(Row(run.label, size / each, paper, _OTHER))
        ratios.append(Row(run.label, vanilla / each, paper / SEQUENCES["Vanilla"] if paper else None, _FUSED))
    return Result(
        (
            Table("Time of a step (ms)", tuple(steps), 1),
            Table("Sequences a second", tuple(rates), 1),
            Table("Speed over vanilla's", tuple(ratios)),
        ),
        ("Vanilla attends with the fused kernel that PyTorch has for the GPU.", *found.notes),
    )

"""The table of the parity matrix: what is split between how many processes, and what is trained."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Processes of a job, and the settings that split a run between them."""

    processes: int
    settings: tuple[str, ...]


TENSOR, PIPELINE, CONTEXT = "parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2"
INTERLEAVED = (PIPELINE, "parallel.virtual_pipeline=2")
SEQUENCE = (TENSOR, "parallel.sequence_parallel=true")
LAYOUTS = {
    "data 2": Layout(2, ()),
    "tensor 2": Layout(2, (TENSOR,)),
    "sequence 2": Layout(2, SEQUENCE),
    "pipeline 2": Layout(2, (PIPELINE,)),
    "interleaved 2": Layout(2, INTERLEAVED),
    "context 2": Layout(2, (CONTEXT,)),
    "context 4": Layout(4, ("parallel.context=4",)),
    "tensor 2, pipeline 2": Layout(4, (TENSOR, PIPELINE)),
    "tensor 2, data 2": Layout(4, (TENSOR,)),
    "context 2, data 2": Layout(4, (CONTEXT,)),
    "context 2, tensor 2": Layout(4, (CONTEXT, TENSOR)),
    "context 2, sequence 2": Layout(4, (CONTEXT, *SEQUENCE)),
    "context 2, interleaved 2": Layout(4, (CONTEXT, *INTERLEAVED)),
}
"""What is left of the processes is data-parallel."""
if importlib.util.find_spec("deepspeed") is not None:
    LAYOUTS |= {
        f"ZeRO {stage}": Layout(2, ("parallel.engine=deepspeed", f"parallel.zero_stage={stage}")) for stage in (1, 2, 3)
    }

_SEPLLM = ("attention.window=64", "attention.full_layers=[0, -1]")
ATTENTIONS = {
    "full": ("attention.window=null", "attention.separators=[]", "attention.sinks=0"),
    "sepllm": _SEPLLM,
    "packed": (*_SEPLLM, "attention.document_boundaries=true"),
}
RECOMPUTE = {"kept": "false", "recomputed": "true", "selective": "selective"}
"""``train.recompute``"""


@dataclass(frozen=True)
class Cell:
    """A run of the matrix."""

    layout: str
    attention: str
    recompute: str

    @property
    def name(self) -> str:
        return f"{self.layout}; {self.attention}; {self.recompute}"

    @property
    def one(self) -> str:
        """The name of the run that it is held to: of one process, which keeps its activations."""
        return f"one; {self.attention}"

    @property
    def settings(self) -> tuple[str, ...]:
        recompute = f"train.recompute={RECOMPUTE[self.recompute]}"
        return *LAYOUTS[self.layout].settings, *ATTENTIONS[self.attention], recompute


def cells(processes: int) -> Iterator[Cell]:
    """Every run of so many processes: recomputation in full of all, of the attention alone where it gathers keys."""
    for layout, found in LAYOUTS.items():
        for attention in ATTENTIONS if found.processes == processes else ():
            yield Cell(layout, attention, "kept")
            yield Cell(layout, attention, "recomputed")
            if attention == "packed":
                yield Cell(layout, attention, "selective")

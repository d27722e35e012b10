"""Which layouts of a number of GPUs hold a run, with the micro-batch and the recomputation that make each fastest."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_sep.config.gpus import NODE, Gpu
from megatron_sep.config.layout import job_mistakes, split_mistakes
from megatron_sep.config.needs import Needs
from megatron_sep.config.schema import ParallelConfig, Recompute, TrainConfig
from megatron_sep.config.speeds import Speeds
from megatron_sep.config.step_time import StepTime

SPARE = 0.92
"""Share of a GPU's memory that a plan may fill: CUDA's context and fragments need the rest."""
_RECOMPUTE: tuple[Recompute, ...] = (False, "selective", True)
_MOST_STAGES = 16
_ALIKE = 1.02
"""Times that an estimate does not tell apart: of those, the one that needs the least memory is taken."""


@dataclass(frozen=True)
class Choice:
    """A layout with the best settings that were found for it, or with what is in its way."""

    parallel: ParallelConfig
    needs: Needs | None = None
    seconds: float = 0.0
    why_not: str = ""
    too_large: bool = False
    """Is memory all that is in its way?"""

    @property
    def settings(self) -> str:
        """As overrides of the command line."""
        parallel = self.parallel
        axes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
        words = [f"parallel.{axis}={ranks}" for axis, ranks in axes.items()]
        if parallel.tensor > 1:
            words.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
        if self.needs:
            train = self.needs.config.train
            words += [
                f"train.micro_batch_size={train.micro_batch_size}",
                f"train.recompute={str(train.recompute).lower()}",
            ]
        return " ".join(words)

    def __str__(self) -> str:
        if self.needs is None:
            return f"{self.settings}: {self.why_not}"
        return f"{self.settings}: {self.seconds * 1e3:,.1f} ms a step, {self.needs.device_bytes / 1e9:,.1f} GB"


def choices(needs: Needs, gpu: Gpu, speeds: Speeds, separator_share: float) -> list[Choice]:
    """Those that fit, the fastest first, then those that do not, with why."""
    found = [_best(needs, parallel, gpu, speeds, separator_share) for parallel in _layouts(needs)]
    fitting = sorted((one for one in found if one.needs), key=lambda one: one.seconds)
    return fitting + [one for one in found if one.needs is None]


def fastest(found: list[Choice]) -> Choice | None:
    """None where nothing fits."""
    return found[0] if found and found[0].needs else None


def _layouts(needs: Needs) -> Iterator[ParallelConfig]:
    """Powers of two and what is configured; sequences are shared as they are configured, other engines as they are."""
    parallel = needs.config.parallel
    if parallel.engine != "megatron":
        yield parallel
        return
    tensors = sorted({*_powers(NODE), parallel.tensor})
    stages = sorted({*_powers(_MOST_STAGES), parallel.pipeline})
    for tensor, pipeline in product(tensors, stages):
        if needs.ranks % (tensor * pipeline * parallel.context) == 0:
            sequence = tensor > 1 and needs.config.train.loss_chunk is None
            chunks = parallel.virtual_pipeline if pipeline == parallel.pipeline else 1
            yield parallel.model_copy(
                update={
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "virtual_pipeline": chunks,
                    "sequence_parallel": sequence,
                }
            )


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def _best(needs: Needs, parallel: ParallelConfig, gpu: Gpu, speeds: Speeds, separator_share: float) -> Choice:
    mistakes = split_mistakes(needs.config.model, parallel)
    if needs.vocab_size % parallel.tensor:
        mistakes.append(f"a vocabulary of {needs.vocab_size} does not divide by parallel.tensor={parallel.tensor}")
    if mistakes:
        return Choice(parallel, why_not=f"cannot be: {mistakes[0]}")
    tried = list(_settings(needs, parallel))
    if not tried:
        return Choice(parallel, why_not=f"cannot be: {job_mistakes(parallel, _smallest(needs), needs.ranks)[0]}")
    fitting = [one for one in tried if one.device_bytes <= SPARE * gpu.memory]
    if not fitting:
        least = min(one.device_bytes for one in tried) / 1e9
        why_not = f"does not fit: takes {least:,.1f} of {gpu.memory / 1e9:,.1f} GB at the least"
        return Choice(parallel, why_not=why_not, too_large=True)
    timed = [(StepTime(one, gpu, speeds, separator_share).seconds, one) for one in fitting]
    least_seconds = min(seconds for seconds, _ in timed)
    alike = [(seconds, one) for seconds, one in timed if seconds <= least_seconds * _ALIKE]
    seconds, chosen = min(alike, key=lambda one: one[1].device_bytes)
    return Choice(parallel, chosen, seconds)


def _settings(needs: Needs, parallel: ParallelConfig) -> Iterator[Needs]:
    """Micro-batches that are powers of two, and the one that is configured, with every recomputation."""
    config = needs.config.model_copy(update={"parallel": parallel})
    sizes = sorted({*_powers(config.train.global_batch_size), config.train.micro_batch_size})
    for micro, recompute in product(sizes, _RECOMPUTE):
        train = config.train.model_copy(update={"micro_batch_size": micro, "recompute": recompute})
        if not job_mistakes(parallel, train, needs.ranks):
            yield Needs(config.model_copy(update={"train": train}), needs.vocab_size, needs.ranks)


def _smallest(needs: Needs) -> TrainConfig:
    return needs.config.train.model_copy(update={"micro_batch_size": 1})

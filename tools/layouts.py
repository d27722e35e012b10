"""Print which layout to train a long-context model in, from formulae alone: memory, bytes and efficiency a GPU.

    python tools/layouts.py [--models pythia-12b llama-3-8b] [--tokens 32768 131072 1048576] [--gpus 8 64 1024]

Every layout that divides the model and fits the memory is estimated; the fastest one is printed. What it assumes stands
in its constants: of those only the rate of attention was measured. docs/parallelism.md has the formulae.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_sep.config.layout import split_mistakes
from megatron_sep.config.schema import ModelConfig, ParallelConfig
from megatron_sep.config.size import ModelSize
from megatron_sep.config.traffic import data_bytes, landmark_bytes, pipeline_bytes, tensor_bytes

MODELS = {
    "pythia-12b": ModelConfig(num_layers=36, hidden_size=5120, num_attention_heads=40, vocab_size=50688),
    "llama-3-8b": ModelConfig(
        num_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, ffn_hidden_size=14336,
        norm="rmsnorm", activation="swiglu", biases=False, vocab_size=128256, rotary_fraction=1.0,
        parallel_residual=False,
    ),
}  # fmt: skip
WINDOW, SHARE = 256, 0.15
"""Of SepLLM: tokens of the window, share of the tokens that are landmarks."""
BATCH_TOKENS = 2**22
"""Of a step: what large models are trained with."""
MEMORY = 72e9
"""Bytes of a GPU of 80 GB that a layout may plan with."""
PEAK = 989e12
"""Of an H100 in bf16, operations a second."""
MATRIX_RATE, ATTENTION_RATE = 0.55, 0.35
"""Shares of the peak that one GPU reaches in matrix products (assumed) and, counted by visible pairs, in attention (of
131,072 tokens, forward and backward, docs/performance.md)."""
NODE, NODE_BANDWIDTH, NETWORK_BANDWIDTH = 8, 300e9, 40e9
"""GPUs of a node, and bytes a second that a GPU receives within one and from others (400 Gbit/s)."""


@dataclass(frozen=True)
class Estimate:
    """Of a layout: per GPU and step."""

    parallel: ParallelConfig
    data: int
    sequences: int
    """Of a step."""
    memory: float
    """Bytes."""
    received: dict[str, float]
    """Bytes by kind."""
    seconds: float
    ideal: float
    """Seconds of the computation alone, at the rates of one GPU."""

    @property
    def efficiency(self) -> float:
        return self.ideal / self.seconds


def layouts(model: ModelConfig, gpus: int, sequences: int) -> Iterator[tuple[ParallelConfig, int]]:
    """Layouts that divide the model, the sequence and the batch, and their number of data-parallel ranks."""
    powers = [2**i for i in range(11)]
    for tensor, pipeline, chunks, context in product(powers[:4], powers[:4], (1, 2), powers):
        parts = tensor * pipeline * context
        if gpus % parts or sequences % (gpus // parts) or (chunks > 1 and pipeline == 1):
            continue
        parallel = ParallelConfig(
            tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, context=context, sequence_parallel=tensor > 1
        )
        microbatches = sequences // (gpus // parts)
        rounds = chunks == 1 or microbatches % pipeline == 0
        if rounds and not split_mistakes(model, parallel):
            yield parallel, gpus // parts


def estimate(model: ModelConfig, parallel: ParallelConfig, data: int, sequences: int) -> Estimate:
    """One sequence a micro-batch, every layer recomputed, AdamW's state split over data and context."""
    size = ModelSize(model, model.vocab_size or 0)
    microbatches = sequences // data
    weights = own_weights(size, parallel)
    tokens = model.sequence_length / parallel.context
    received = {
        "tensor": tensor_bytes(model, parallel, tokens, passes=3) * microbatches,
        "context": context_bytes(model, parallel) * microbatches,
        "pipeline": pipeline_bytes(model, parallel, tokens) * microbatches,
        "data": data_bytes(weights, data * parallel.context),
    }
    ideal = compute_seconds(size, sequences) / (data * parallel.tensor * parallel.pipeline * parallel.context)
    bubble = 1 + (parallel.pipeline - 1) / (parallel.virtual_pipeline * microbatches)
    seconds = (ideal * 4 / 3 + seconds_of(received, parallel, data)) * bubble  # a third more: the layers run again
    memory = weights * (2 + 4 + 12 / (data * parallel.context)) + activation_bytes(model, parallel)
    return Estimate(parallel, data, sequences, memory, received, seconds, ideal)


def own_weights(size: ModelSize, parallel: ParallelConfig) -> float:
    """Of the fullest pipeline stage: a stage's layers and one of the two embeddings."""
    embedding = size.embedding_parameters / (2 if parallel.pipeline > 1 else 1)
    return ((size.parameters - size.embedding_parameters) / parallel.pipeline + embedding) / parallel.tensor


def activation_bytes(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Inputs of the recomputed layers in flight, one layer at work with its gathered keys, and the logits.

    34 bytes a token and value of the width are a layer's (arXiv 2205.05198, eq. 2, without the scores).
    """
    tokens = model.sequence_length / parallel.context
    in_flight: float = model.num_layers
    if parallel.virtual_pipeline > 1:
        in_flight *= 1 + (parallel.pipeline - 1) / (parallel.pipeline * parallel.virtual_pipeline)
    kept = 2 * tokens * model.hidden_size * in_flight / parallel.tensor
    working = 34 * tokens * model.hidden_size / parallel.tensor
    keys = 2 * 2 * 2 * key_width(model, parallel) * (tokens + SHARE * model.sequence_length + 2 * WINDOW)
    logits = tokens * (model.vocab_size or 0) / parallel.tensor * (2 + 4)
    return kept + working + keys + logits


def key_width(model: ModelConfig, parallel: ParallelConfig) -> float:
    return model.key_value_heads * model.head_size / parallel.tensor


def context_bytes(model: ModelConfig, parallel: ParallelConfig) -> float:
    """Of a micro-batch: the keys of the landmarks and windows forward, again, and their gradients back."""
    layer = landmark_bytes(
        1, model.sequence_length, int(key_width(model, parallel)), parallel.context, share=SHARE, window=WINDOW
    )
    return 3 * layer * model.num_layers / parallel.pipeline


def compute_seconds(size: ModelSize, sequences: int) -> float:
    """Of a step, on one GPU: matrix products and the visible pairs of attention, each at its rate."""
    length = size.config.sequence_length
    pairs = length * WINDOW + SHARE * (length - WINDOW) ** 2 / 2
    matrices = size.training_flops(length, 0)
    attention = size.training_flops(0, pairs * size.config.num_layers)
    return sequences * (matrices / MATRIX_RATE + attention / ATTENTION_RATE) / PEAK


def seconds_of(received: dict[str, float], parallel: ParallelConfig, data: int) -> float:
    """Nothing overlaps: within a node while tensor, then context, data and pipeline parallelism fit into it."""
    seconds, together = 0.0, 1
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "data": data, "pipeline": parallel.pipeline}
    for kind, ranks in sizes.items():  # in the order in which megatron-core numbers the processes
        together *= ranks
        seconds += received[kind] / (NODE_BANDWIDTH if together <= NODE else NETWORK_BANDWIDTH)
    return seconds


def best(model: ModelConfig, gpus: int) -> Estimate | None:
    """The fastest layout that fits; None where none does."""
    sequences = max(1, BATCH_TOKENS // model.sequence_length)
    found = [estimate(model, parallel, data, sequences) for parallel, data in layouts(model, gpus, sequences)]
    fitting = [one for one in found if one.memory <= MEMORY]
    return min(fitting, key=lambda one: (one.seconds, one.memory)) if fitting else None


def line(name: str, model: ModelConfig, gpus: int) -> str:
    """One row of the table."""
    found = best(model, gpus)
    start = f"| {name} | {model.sequence_length // 1024}k | {gpus} | "
    if found is None:
        return start + "none fits | | | | | |"
    p = found.parallel
    stages = f"{p.pipeline} x {p.virtual_pipeline}" if p.virtual_pipeline > 1 else str(p.pipeline)
    gigabytes = {kind: f"{size / 1e9:.1f}" for kind, size in found.received.items()}
    moved = " / ".join(gigabytes[kind] for kind in ("tensor", "context", "pipeline", "data"))
    layout = f"{p.tensor} / {p.context} / {stages} / {found.data}"
    return start + f"{layout} | {found.memory / 1e9:.0f} | {moved} | {found.seconds:.1f} | {found.efficiency:.2f} |"


def main() -> None:
    """Parse the command line, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**15, 2**17, 2**20], help="of a sequence")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 1024])
    options = parser.parse_args()
    columns = "model; tokens; GPUs; tensor / context / pipeline / data; GB; GB received; s; efficiency"
    print(f"| {columns.replace(';', ' |')} |\n|{'---|' * len(columns.split(';'))}")
    for name, length, gpus in product(options.models, options.tokens, options.gpus):
        print(line(name, MODELS[name].model_copy(update={"sequence_length": length}), gpus))


if __name__ == "__main__":
    main()

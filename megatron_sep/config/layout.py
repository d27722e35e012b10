"""What does not divide where a run is split between processes, all of it at once and in words; torch-free."""

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sep.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig


def split_mistakes(model: "ModelConfig", parallel: "ParallelConfig") -> list[str]:
    """Of a model that no number of processes could hold in this layout."""
    tensor = {"parallel.tensor": parallel.tensor}
    stages = {"parallel.pipeline": parallel.pipeline}
    if parallel.virtual_pipeline > 1:
        stages["parallel.virtual_pipeline"] = parallel.virtual_pipeline
    chunks = {"2 x parallel.context": 2 * parallel.context} if parallel.context > 1 else {}
    checks: list[tuple[str, int, dict[str, int]]] = [
        ("num_attention_heads", model.num_attention_heads, tensor),
        ("num_key_value_heads", model.key_value_heads, tensor),
        ("ffn_hidden_size", model.mlp_size, tensor),
        ("vocab_size", model.vocab_size or 0, tensor),  # 0: only the tokenizer knows it
        ("num_layers", model.num_layers, stages),
        ("sequence_length", model.sequence_length, chunks | (tensor if parallel.sequence_parallel else {})),
    ]
    kind = model.position.kind
    unshared = (
        []
        if parallel.context == 1 or kind == "rotary"
        else [f"model.position.kind={kind}: is not computed with sequences shared among ranks; set parallel.context=1"]
    )
    return unshared + [
        f"model.{name}={size} does not divide by {' x '.join(by)}={prod(by.values())}"
        for name, size, by in checks
        if size % prod(by.values())
    ]


def engine_mistakes(parallel: "ParallelConfig", train: "TrainConfig", optimizer: "OptimizerConfig") -> list[str]:
    """Of what an engine is asked to train with and cannot."""
    muon, deepspeed = optimizer.kind == "muon", parallel.engine == "deepspeed"
    checks = (
        (
            muon and parallel.engine != "megatron",
            f"optimizer.kind=muon turns whole matrices, which parallel.engine={parallel.engine} cuts into pieces: set "
            "parallel.engine=megatron, or optimizer.kind=adamw",
        ),
        (
            muon and train.precision == "fp16",
            "optimizer.kind=muon trains in bf16 or fp32: set train.precision, or optimizer.kind=adamw",
        ),
        (
            deepspeed and train.precision == "fp16",
            "parallel.engine=deepspeed trains in bf16 or fp32: set train.precision, or parallel.engine=megatron",
        ),
        (
            deepspeed and train.cuda_graphs == "on",
            "train.cuda_graphs=on needs parallel.engine=megatron; DeepSpeed's passes talk to other ranks",
        ),
        (
            parallel.zero_stage == 3 and train.compile == "on",
            "parallel.zero_stage=3 gathers each layer when it runs, which train.compile=on cannot follow; set "
            "train.compile=off or a lower zero_stage",
        ),
        (
            parallel.splits_layers and train.compile == "on",
            "a layer of parallel.tensor or parallel.context talks to other ranks in its midst, which train.compile=on "
            "has wrong gradients for; set train.compile=auto",
        ),
    )
    return [message for wrong, message in checks if wrong]


def job_mistakes(parallel: "ParallelConfig", train: "TrainConfig | None", processes: int) -> list[str]:
    """Of a layout, and of a global batch where ``train`` is given, for a job of so many processes."""
    model_parallel = parallel.tensor * parallel.context * parallel.pipeline
    if processes % model_parallel:
        return [
            f"parallel.tensor={parallel.tensor} x parallel.context={parallel.context} x parallel.pipeline="
            f"{parallel.pipeline} does not divide the {processes} process(es) of this job; start a multiple of "
            f"{model_parallel} or lower one of them"
        ]
    return [] if train is None else _batch_mistakes(parallel, train, processes // model_parallel)


def _batch_mistakes(parallel: "ParallelConfig", train: "TrainConfig", data_ranks: int) -> list[str]:
    together = train.micro_batch_size * data_ranks
    if train.global_batch_size % together:
        return [
            f"train.global_batch_size={train.global_batch_size} does not divide by train.micro_batch_size="
            f"{train.micro_batch_size} x {data_ranks} data-parallel rank(s); set it to a multiple of {together}"
        ]
    count = train.global_batch_size // together
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        return [
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs micro-batches in rounds of parallel.pipeline="
            f"{parallel.pipeline}, and there are {count} in a step; set train.global_batch_size to a multiple of "
            f"{together * parallel.pipeline}"
        ]
    return []

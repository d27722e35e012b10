"""Bytes that one rank receives from others; torch-free.

First of a context-parallel rank for the attention of a layer, forward, by each way of doing it: keys and values are
``key_width`` numbers each (key heads x head size; of this tensor-parallel rank), and the backward pass sends as much
back. Then of a micro-batch by each axis of a layout; ``passes`` is 2, or 3 where layers are computed a second time.
"""

from megatron_sep.config.schema import ModelConfig, ParallelConfig


def all_gather_bytes(rows: int, length: int, key_width: int, ranks: int, number_bytes: int = 2) -> float:
    """Of all keys and values, at once or around a ring: what full attention takes."""
    return 2 * number_bytes * rows * length * key_width * (ranks - 1) / ranks


def ulysses_bytes(rows: int, length: int, query_width: int, key_width: int, ranks: int, number_bytes: int = 2) -> float:
    """Of queries, keys, values and outputs exchanged for heads (arXiv 2309.14509): no more ranks than key heads."""
    return 2 * number_bytes * rows * (length / ranks) * (query_width + key_width) * (ranks - 1) / ranks


def landmark_bytes(
    rows: int,
    length: int,
    key_width: int,
    ranks: int,
    *,
    share: float,
    window: int,
    rank: int = 0,
    number_bytes: int = 2,
) -> float:
    """Of the landmarks before a rank's late chunk and the window before each chunk: what Sep-Attention takes here.

    ``share`` of the tokens are landmarks. Rank 0 receives the most. The window is no longer than a chunk of the
    sequence, and a row is one document.
    """
    chunks_before = 2 * ranks - 2 - rank
    landmarks = share * length * chunks_before / (2 * ranks)
    windows = 0 if ranks == 1 else 1 if rank in (0, ranks - 1) else 2
    return 2 * number_bytes * rows * key_width * (landmarks + windows * (window - 1) * (1 - share))


def tensor_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: float, passes: int) -> float:
    """Of 16-bit values of the width: 4 gathers or reductions a layer and pass, with sequence parallelism or without."""
    each = 2 * tokens * model.hidden_size * (1 - 1 / parallel.tensor)
    return passes * 4 * each * model.num_layers / parallel.pipeline


def pipeline_bytes(model: ModelConfig, parallel: ParallelConfig, tokens: float) -> float:
    """A stage's input, and its output's gradient, once a chunk."""
    if parallel.pipeline == 1:
        return 0.0
    return 2 * 2 * tokens * model.hidden_size / parallel.tensor * parallel.virtual_pipeline


def data_bytes(weights: float, ranks: int) -> float:
    """Of a step: fp32 gradients in and 16-bit weights back, shared among ``ranks`` of the same weights (ZeRO-1)."""
    return 6 * weights * (1 - 1 / ranks)


def gathered_bytes(weights: float, ranks: int) -> float:
    """Of a micro-batch where 16-bit weights are shared too (ZeRO-3): forward and backward fetch them."""
    return 2 * 2 * weights * (1 - 1 / ranks)

"""Measured speeds of one GPU, from which the time of a step is put together; torch-free.

Every number stands in docs/performance.md or follows from two of its rows: an attention's time is a part for each
(token, head) and a part for each pair that it looks at. What was never measured is scaled by data sheets and says so.
"""

from dataclasses import dataclass

from megatron_sep.config.gpus import Gpu, find_gpu


@dataclass(frozen=True)
class AttentionSpeed:
    """Of forward and backward pass together, bf16, for heads of 64 and of 128 values."""

    token_head_ns: tuple[float, float]
    """Nanoseconds for a token in a head."""
    pair_ps: tuple[float, float]
    """Picoseconds for a (query, key) pair in a head that is looked at."""

    def seconds(self, token_heads: float, pair_heads: float, head_size: int) -> float:
        """Between and beyond the two sizes in proportion to the values of a head."""
        return (
            _at(self.token_head_ns, head_size) * 1e-9 * token_heads + _at(self.pair_ps, head_size) * 1e-12 * pair_heads
        )

    def scaled(self, factor: float) -> "AttentionSpeed":
        """Times of a GPU that takes ``factor`` as long."""
        a, b = self.token_head_ns, self.pair_ps
        return AttentionSpeed((a[0] * factor, a[1] * factor), (b[0] * factor, b[1] * factor))


def _at(values: tuple[float, float], head_size: int) -> float:
    small, large = values
    share = (head_size - 64) / 64
    return max(small + (large - small) * share, small * head_size / 64 if head_size < 64 else 0.0)


@dataclass(frozen=True)
class Speeds:
    """Of one kind of GPU."""

    source: str
    """Where the numbers are from, or that they are estimates."""
    matrix_flops: float
    """Operations a second of the matrix products of a step."""
    memory: float
    """Bytes a second, at best."""
    full: AttentionSpeed
    sep: AttentionSpeed

    elementwise: float = 0.80
    """Share of the memory's rate that norms, rotation, activation and loss reach in a step (16 x 2048, 160m, H200)."""
    optimizer: float = 0.58
    """The same of clipping and AdamW."""
    busy: float = 0.97
    """Share of a step in which the GPU computes."""


MEASURED = {
    "h200": Speeds(
        source="docs/performance.md, one H200, 2026-11-22 and 2026-11-26",
        matrix_flops=684e12,  # 160m, 16 x 2048: 24.3 TFLOP in 35.5 ms
        memory=4275e9,  # an addition to 1 GiB
        full=AttentionSpeed((0.47, 1.05), (2.09, 3.05)),
        sep=AttentionSpeed((0.50, 1.33), (3.50, 4.50)),
    ),
}
"""By the name that ``plan --gpu`` takes."""


def speeds_of(name: str) -> Speeds:
    """Measured, or scaled from the H200 by peak and bandwidth. Raises GpuError."""
    gpu = find_gpu(name)
    return MEASURED.get(name.lower()) or _scaled(gpu)


def _scaled(gpu: Gpu) -> Speeds:
    known, base = MEASURED["h200"], find_gpu("h200")
    compute, moved = gpu.peak / base.peak, gpu.bandwidth / base.bandwidth
    return Speeds(
        source=f"estimated: the H200's by data sheets, {compute:.2f}x its peak and {moved:.2f}x its bandwidth",
        matrix_flops=known.matrix_flops * compute,
        memory=known.memory * moved,
        full=known.full.scaled(1 / compute),
        sep=known.sep.scaled(1 / compute),
    )

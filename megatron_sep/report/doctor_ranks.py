"""What every rank of a job can do, measured on all of them: the one that fails or is slow is named."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.errors import RunFailure
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS
from megatron_sep.kernels.sep_attention.index import indexed_layers
from megatron_sep.kernels.sep_attention.reference import reference_attention
from megatron_sep.parallel.topology import Topology

REPEATS = 5
SLOW = 1.5
"""Times the median of all ranks."""
_LEAST_SECONDS = 1e-3
"""What is shorter is too short to call a rank slow by it."""
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Of attention's output and gradients, against the reference in fp64, relative to the largest value."""


class SickRankError(RunFailure):
    """A rank that is absent, computes something wrong, or takes much longer than the others."""


class WrongResultError(RunFailure):
    """A device or a network that computes something else than it should."""


@dataclass(frozen=True)
class Finding:
    """One check on one rank."""

    host: str
    seconds: float
    """The fastest of some repeats; 0 where it failed."""
    wrong: str | None = None


def all_reduce(topology: Topology) -> Callable[[], None]:
    """Sums of 64 MB over all ranks, which are whole numbers."""
    ranks = topology.process.size
    ones = torch.ones(16_000_000, device=topology.device)

    def run() -> None:
        total = ones * (topology.process.rank + 1)
        dist.all_reduce(total)
        expected = ranks * (ranks + 1) / 2
        if not bool((total == expected).all()):
            raise WrongResultError(f"the sum over {ranks} ranks is {float(total.max())}, not {expected}")

    return run


def matrix_product(topology: Topology) -> Callable[[], None]:
    """Products of matrices of whole numbers, which fp32 holds exactly."""
    size = 4096 if topology.device.type == "cuda" else 512
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randint(-2, 3, (size, size), generator=generator) for _ in range(2))
    expected = (a.double() @ b.double()).float().to(topology.device)
    left, right = a.float().to(topology.device), b.float().to(topology.device)

    def run() -> None:
        wrong = int((left @ right != expected).sum())
        if wrong:
            raise WrongResultError(f"{wrong} of {size * size} values of a matrix product are wrong")

    return run


def attention(topology: Topology) -> Callable[[], None]:
    """Sep-Attention by the row that a run takes, against the reference in fp64: output and every gradient."""
    device = topology.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attend = OPERATIONS["sep_attention"].resolve(Call.on(device, dtype, head_size=64, training=True))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 10, (1, 512), generator=generator).to(device)
    (plan,) = indexed_layers((AttentionPattern(32, 3, (0, 1)).plan(ids),))
    inputs = [torch.randn(1, 4, 512, 64, generator=generator).to(device, dtype) for _ in range(4)]
    expected = _with_gradients(reference_attention, [x.double() for x in inputs], plan)

    def run() -> None:
        for name, found, right in zip(
            ("output", "dq", "dk", "dv"), _with_gradients(attend, inputs, plan), expected, strict=True
        ):
            off = float((found.double() - right).abs().max() / right.abs().max())
            if not off <= _TOLERANCE[dtype]:
                raise WrongResultError(f"attention's {name} is {off:.1e} off the reference")

    return run


def _with_gradients(attend: Callable[..., Tensor], inputs: Sequence[Tensor], plan: object) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v, plan, 0.125)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


CHECKS: dict[str, Callable[[Topology], Callable[[], None]]] = {
    "matrix product": matrix_product,
    "attention against its reference": attention,
    "all-reduce of 64 MB": all_reduce,
}
"""By name, what prepares a check; every rank does them in this order."""


def examine(topology: Topology, timeout_minutes: float = 2) -> Iterator[str]:
    """A line a check. Every rank of the job calls it. Raises SickRankError at the end, naming each sick rank."""
    _wait_for_all(topology, timeout_minutes)
    sick: list[str] = []
    for name, prepare in CHECKS.items():
        findings: list[Finding] = topology.collect(partial(measure, prepare, topology))
        yield in_words(name, findings)
        sick += complaints(name, findings)
    if sick:
        raise SickRankError("; ".join(sick))


def _wait_for_all(topology: Topology, minutes: float) -> None:
    """Every rank there, or the absent ones named. The check runs over gloo, which can tell them."""
    gloo = dist.new_group(backend="gloo")
    try:
        dist.monitored_barrier(gloo, timedelta(minutes=minutes), wait_all_ranks=True)
    except RuntimeError as error:
        raise SickRankError(f"not all of {topology.process.size} ranks are there: {error}") from error


def measure(prepare: Callable[[Topology], Callable[[], None]], topology: Topology) -> Finding:
    """The fastest of some repeats on this rank, or what is wrong."""
    try:
        run = prepare(topology)
        run()
        return Finding(platform.node(), min(_seconds(run, topology) for _ in range(REPEATS)))
    except Exception as error:  # a device that is broken fails in its own ways, and each is a finding
        return Finding(platform.node(), 0.0, str(error) or repr(error))


def _seconds(run: Callable[[], None], topology: Topology) -> float:
    start = time.perf_counter()
    run()
    if topology.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_words(name: str, findings: Sequence[Finding]) -> str:
    """Fastest and slowest rank of a check."""
    times = [finding.seconds for finding in findings if finding.wrong is None]
    if not times:
        return f"{name}: fails on every rank"
    slowest = max(range(len(findings)), key=lambda rank: findings[rank].seconds)
    return (
        f"{name}: {1000 * min(times):.1f} to {1000 * max(times):.1f} ms on {len(times)} rank(s), slowest rank {slowest}"
    )


def complaints(name: str, findings: Sequence[Finding]) -> Iterator[str]:
    """Ranks that fail, and those that take more than 1.5 times the median."""
    times = [finding.seconds for finding in findings if finding.wrong is None]
    limit = max(SLOW * statistics.median_low(times), _LEAST_SECONDS) if times else 0.0
    for rank, finding in enumerate(findings):
        if finding.wrong is not None:
            yield f"rank {rank} on {finding.host} fails at {name}: {finding.wrong}"
        elif finding.seconds > limit:
            took, median = 1000 * finding.seconds, 1000 * statistics.median_low(times)
            yield f"rank {rank} on {finding.host} takes {took:.1f} ms for {name}, the median is {median:.1f}"

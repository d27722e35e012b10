"""Preparation on a Ray cluster: a task for each part, and in it tasks for blocks of text, wherever there is room.

Tasks write nothing but files of a part's folder, which one process at a time has locked, so a worker or a driver that
is killed costs what was not yet committed. All nodes see the text, and the output's folder or the same object store.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import RunFailure, SepError
from megatron_sep.files import read_json
from megatron_sep.prepare import worker
from megatron_sep.prepare.assemble import assemble
from megatron_sep.prepare.at_work import whole_work
from megatron_sep.prepare.decisions import decide
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import in_order
from megatron_sep.prepare.prepare import Wish, delivered
from megatron_sep.prepare.progress import Progress
from megatron_sep.prepare.readings import total_bytes
from megatron_sep.prepare.receipt import Manifest, PrepareError, finished, made_files, publish, refuse_foreign
from megatron_sep.prepare.remote_work import RemoteWork
from megatron_sep.prepare.stages import encode, scan
from megatron_sep.prepare.work import Work

with needs_extra("ray", "ray"):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_PARTS_A_CORE = 4
_LOOK_SECONDS = 2.0
_CLEAR_SECONDS = 60.0
_AGAIN = {"num_cpus": 1, "max_retries": -1, "scheduling_strategy": "SPREAD"}
"""Of every task: where its worker or node is killed, another does it."""
_STAGES = {"scan": scan, "encode": encode}


class RayPool:
    """``pool.Pool`` on the cluster that this process is connected to."""

    def __init__(self, job: Any) -> None:
        """``job`` is the reference of a Job."""
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        self.size, self.machines = max(int(sum(nodes)), 1), max(len(nodes), 1)
        self._job = job

    def map(self, function: Callable[[Any], Any], items: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """As ``Pool`` says."""
        task = ray.remote(_call).options(**_AGAIN)
        return in_order(items, partial(task.remote, [self._job], function), _result, self.size)


def prepare_on(config: PrepareConfig, address: str | None) -> Manifest:
    """What ``prepare`` does, on the cluster at ``address``; None: the one that Ray finds, else this machine's cores.

    Raises TextError, TokenizerError, PrepareError; then the work so far stays, for the next try.
    """
    wish = Wish.of(config)
    already = finished(config.output, wish.plan, wish.settings)
    if already is not None:
        return delivered(config, already, wish)
    _connect(address)
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        parts = min(len({reading.file for reading in wish.plan}), _PARTS_A_CORE * cores)
        with whole_work(config, wish.begun(), parts) as (folder, work, begun):
            if not (folder / "manifest.json").exists():
                refuse_foreign(made_files(config.output).values())
                _make(wish.job(folder, begun, work), wish)
            made = publish(config.output, folder)
        _clear_nodes(work)
    finally:
        ray.shutdown()
    return delivered(config, made, wish)


def _connect(address: str | None) -> None:
    """Raises PrepareError where nobody answers."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level="WARNING", configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PrepareError(
            f"--on ray://{address}: no Ray cluster answers there ({error}); give the address that `ray start --head` "
            "prints, as in ray://10.0.0.1:6379, from a machine of the cluster"
        ) from error


def _make(job: Job, wish: Wish) -> None:
    reference = ray.put(job)
    pool = RayPool(reference)
    if job.scans:
        _all_parts(job, reference, "scan", total_bytes(job.first_pass))
        decide(job, pool)
    _all_parts(job, reference, "encode", total_bytes(job.plan))
    assemble(job, wish.tokenizer, wish.settings, pool)


def _all_parts(job: Job, reference: Any, stage: str, total: int) -> None:
    """One stage of all parts at once, with what their ledgers say of it, in a store those of parts that are done."""
    task = ray.remote(_work_on_part).options(**_AGAIN)
    waiting = [task.remote([reference], stage, part) for part in range(job.count)]
    counts: list[Any] = []
    with Progress(stage, total) as progress:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
            for result in done:
                counts.append(_result(result))
            states = job.folder.glob(f"part-*/{stage}.json")
            now = [read_json(path)["value"] for path in states] if job.work.is_shared_disk else counts
            progress.update(*(sum(count[key] for count in now) for key in ("read", "looked_at")))


def _work_on_part(job: list[Any], stage: str, part: int) -> Any:
    """In a task; a killed driver's may still be at work and is waited for where it must be. Returns the counts."""
    found: Job = ray.get(job[0])
    with found.work.part_locked(part):
        _STAGES[stage](found, part, RayPool(job[0]))
    return (found.work.state(part, stage) or {})["value"]


def _clear_nodes(work: Work) -> None:
    """Remove what each node has fetched; one that is lost has nothing any more."""
    if not isinstance(work, RemoteWork):
        return
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(_clear).options(num_cpus=0, scheduling_strategy=there)
            with suppress(ray.exceptions.RayError):
                ray.get(task.remote(work), timeout=_CLEAR_SECONDS)


def _clear(work: RemoteWork) -> None:
    work.clear()


def _call(job: list[Any], function: Callable[[Any], Any], item: Any) -> Any:
    """In a task; the first one of a process makes it a worker."""
    if not worker.is_at_work():
        worker.work_on(ray.get(job[0]))
    return function(item)


def _result(reference: Any) -> Any:
    """Of a task. What ends it as a message, or says a path, comes through as it was raised there."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
            cause = cause.cause
        if isinstance(cause, SepError | OSError):
            raise cause from error
        raise
    except ray.exceptions.RayError as error:
        raise RunFailure(
            f"the Ray cluster lost what it worked on ({error}); run again to go on where it stopped"
        ) from error

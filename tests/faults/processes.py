"""Jobs of several processes."""

from collections.abc import Callable
from pathlib import Path

from support.ports import free_port

from faults.verbs import Verb
from faults.world import World


def start_ranks(
    world: World, run: Path, count: int, *settings: str, before: Callable[[], None] | None = None
) -> list[Verb]:
    """The processes of a job, as torchrun would start them."""
    if count == 1:
        return [world.start(run, *settings, before=before)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    return [
        world.start(run, *settings, before=before, env={**address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def train_pair(world: World) -> None:
    """The run that nothing happens to, on two processes."""
    for ended in [rank.wait() for rank in start_ranks(world, world.pair, 2)]:
        if ended.code:
            raise RuntimeError(f"the run of two processes that nothing happens to failed: {ended.text}")

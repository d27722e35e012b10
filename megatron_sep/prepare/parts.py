"""Work in parts: which files are whose, and where a part's results lie.

A part is a run of whole files in the order in which they are read. What a part writes is joined in the order of the
parts, so the result is the same however many there are and wherever each was worked on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.prepare.readings import Reading
from megatron_sep.prepare.work import Work, part_name


@dataclass(frozen=True)
class Job:
    """All that a part needs to know of the whole; it travels to other processes and machines."""

    config: PrepareConfig
    plan: list[Reading]
    separators: dict[str, int]
    """Text and token of each."""
    folder: Path
    """Of the machine that puts the shard together."""
    count: int
    """Parts."""
    work: Work
    """What the stages hand to each other."""

    @property
    def scans(self) -> bool:
        """Whether each document is looked at before any is written."""
        wanted = self.config.deduplicate
        return bool(wanted.exact or wanted.near or self.config.decontaminate.paths)

    @property
    def first_pass(self) -> list[Reading]:
        """Each file once: what is scanned."""
        return [reading for reading in self.plan if reading.repeat == 0]

    def of_all_parts(self, name: str) -> Iterator[str]:
        """The name of a file of each part, in order."""
        return (f"{part_name(part)}/{name}" for part in range(self.count))

    def get_of_all(self, name: str) -> list[Path]:
        """Where a file of each part can be mapped, in order."""
        return self.work.get_all(self.of_all_parts(name))

    @property
    def tokenizer_path(self) -> Path:
        """Where this machine has it."""
        path = self.config.tokenizer.path
        return path if self.work.is_shared_disk else self.work.get(tokenizer_name(path))


def tokenizer_name(path: Path) -> str:
    """What a tokenizer is in the work: one file, as ``copy_tokenizer`` makes it."""
    return f"tokenizer{path.suffix}"


def partition(plan: Sequence[Reading], count: int) -> list[range]:
    """``count`` runs of whole readings, about equal in bytes; where readings are few or uneven, some are empty."""
    sizes = [reading.size for reading in plan]
    total = max(sum(sizes), 1)
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    owners = [min(int(middle * count / total), count - 1) for middle in middles]
    bounds = [sum(owner < part for owner in owners) for part in range(count + 1)]
    return [range(bounds[part], bounds[part + 1]) for part in range(count)]

"""Text into one shard with its receipt: read, deduplicate, decontaminate, tokenise, write.

The text is cut into parts, runs of files (parts.py). Two passes go over each, resumable ledgers of what workers return
in the order of the text (stages.py): ``scan`` (only where something is to be found) signs each document, ``encode``
writes the tokens of those that stay. Between them it is decided over all parts what stays (decisions.py), after them
the shard is assembled (assemble.py). One process, the jobs of a scheduler and a cluster call these same functions. What
is written depends on the settings and the text alone, so a killed run goes on and ends with the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_sep.attention.separators import PAPER_SEPARATORS
from megatron_sep.config.prepare import PrepareConfig, TextSourceConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from megatron_sep.files import sha256
from megatron_sep.prepare.assemble import assemble
from megatron_sep.prepare.at_work import clear_work, whole_work
from megatron_sep.prepare.decisions import decide
from megatron_sep.prepare.decontaminate import TestRuns
from megatron_sep.prepare.parts import Job, tokenizer_name
from megatron_sep.prepare.pool import Pool, ProcessPool
from megatron_sep.prepare.readings import Reading, readings
from megatron_sep.prepare.receipt import (
    Manifest,
    PrepareError,
    finished,
    held_out_files,
    made_files,
    publish,
    refuse_foreign,
    settings_of,
)
from megatron_sep.prepare.stages import encode, scan
from megatron_sep.prepare.text import Limits
from megatron_sep.prepare.upload import upload, uploaded
from megatron_sep.prepare.work import FolderWork, Work
from megatron_sep.prepare.work_folder import locked


def tokenize_files(
    files: Sequence[Path], tokenizer: Path, prefix: Path, eod: str | None = None, workers: int | None = None
) -> Manifest:
    """``prepare`` with nothing but files and a tokenizer."""
    source = TextSourceConfig(paths=tuple(map(str, files)))
    section = TokenizerConfig(path=tokenizer, eod=eod)
    return prepare(PrepareConfig(output=prefix, tokenizer=section, sources=(source,), workers=workers))


@dataclass(frozen=True)
class Wish:
    """What is asked for, read and found to be possible."""

    config: PrepareConfig
    tokenizer: Tokenizer
    plan: list[Reading]
    settings: Manifest
    uploaded: Manifest | None
    """The receipt where ``upload`` says, of a shard that is done."""

    @classmethod
    def of(cls, config: PrepareConfig) -> "Wish":
        """Raises TextError, TokenizerError, PlaceError, PrepareError."""
        tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.eod)
        plan = readings(config.sources, Limits("", config.on_bad, config.on_blank, config.max_bytes))
        settings = settings_of(config, plan)
        return cls(config, tokenizer, plan, settings, uploaded(config, settings))

    def begun(self) -> Manifest:
        """The settings with the times of all files that are read, which are no part of the receipt."""
        files = [*(reading.file for reading in self.plan), *held_out_files(self.config)]
        return {**self.settings, "changed": [file.stat().st_mtime_ns for file in files]}

    def job(self, folder: Path, parts: int, work: Work | None = None) -> Job:
        """The work, by default in a folder, with what its workers need beside the text."""
        found = work or FolderWork(folder)
        _write_tests(self.config, folder, found)
        if not found.is_shared_disk:
            _show_tokenizer(self.config.tokenizer.path, found)
        return Job(self.config, self.plan, _separators(self.tokenizer), folder, parts, found)


def prepare(config: PrepareConfig, parts: int = 1) -> Manifest:
    """Write OUTPUT.bin, .idx and .manifest.json, or go on with what a killed run left; return the manifest.

    What was begun in other ``parts`` goes on in those.

    Raises TextError, TokenizerError, PlaceError, PrepareError, RunFailure; the work so far stays, for the next try.
    """
    wish = Wish.of(config)
    already = finished(config.output, wish.plan, wish.settings)
    if already is not None:
        return delivered(config, already, wish)
    with whole_work(config, wish.begun(), parts) as (folder, work, begun):
        if not (folder / "manifest.json").exists():
            refuse_foreign(made_files(config.output).values())
            job = wish.job(folder, begun, work)
            with ProcessPool(job) as pool:
                _make(job, wish, pool)
        made = publish(config.output, folder)
    return delivered(config, made, wish)


def delivered(config: PrepareConfig, manifest: Manifest, wish: Wish) -> Manifest:
    """What is left to do once the receipt is in place: copy the shard, and clear away what led to it."""
    upload(config, manifest)
    clear_work(config, wish.begun())
    return manifest


def _make(job: Job, wish: Wish, pool: Pool) -> None:
    """Everything into the work folder, one part after the other."""
    if job.scans:
        for part in range(job.count):
            scan(job, part, pool)
        decide(job, pool)
    for part in range(job.count):
        encode(job, part, pool)
    assemble(job, wish.tokenizer, wish.settings, pool)


def _write_tests(config: PrepareConfig, folder: Path, work: Work) -> None:
    """What workers look for of the test sets, unless it is there."""
    tests = held_out_files(config)
    with locked(folder / "tests.lock", wait=True):
        if tests and not work.has(TestRuns.FILES[-1]):
            limits = Limits(max_bytes=config.max_bytes)
            runs = TestRuns.build(tests, config.decontaminate.fields, config.decontaminate.words, limits)
            with work.made(TestRuns.FILES[-1]) as path:
                runs.save(path.parent)


def _show_tokenizer(path: Path, work: Work) -> None:
    """The tokenizer of this machine to all others, or the same as is there. Raises PrepareError for another one."""
    name = tokenizer_name(path)
    if not work.has(name):
        with work.made(name) as made:
            copy_tokenizer(path, made)
    with TemporaryDirectory() as folder:
        mine = Path(folder) / name
        copy_tokenizer(path, mine)
        if sha256(mine) != sha256(work.get(name)):
            raise PrepareError(
                f"tokenizer.path={path}: is not the file that this work was begun with; give that one or another output"
            )


def _separators(tokenizer: Tokenizer) -> dict[str, int]:
    """The paper's separators that are one token of this tokenizer."""
    found = {text: tokenizer.token_ids(text) for text in PAPER_SEPARATORS}
    return {text: ids[0] for text, ids in found.items() if len(ids) == 1}

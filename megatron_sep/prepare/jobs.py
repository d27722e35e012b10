"""Preparation by the jobs of a scheduler: each works on one part, and `merge` does what needs all of them."""

import re

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.prepare.assemble import assemble
from megatron_sep.prepare.at_work import clear_work, part_work, parts_begun, whole_work
from megatron_sep.prepare.decisions import decide
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import ProcessPool
from megatron_sep.prepare.prepare import Wish, delivered
from megatron_sep.prepare.receipt import (
    PrepareError,
    finished,
    made_files,
    publish,
    refuse_foreign,
    summary,
)
from megatron_sep.prepare.stages import encode, is_done, scan
from megatron_sep.prepare.work import DECIDED

_NAMED = 8


def read_part(text: str) -> tuple[int, int]:
    """Number from 0 and count of "i/N". Raises PrepareError."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise PrepareError(f"--part {text}: is no part; give its number, from 1, and how many there are, as in 3/8")
    return part - 1, parts


def work_on(config: PrepareConfig, part: int, parts: int) -> str:
    """Do what a part can do by itself now; returns in words what is next. Raises TextError, PrepareError."""
    wish = Wish.of(config)
    already = _done(wish, merges=False)
    if already is not None:
        return already
    title = f"part {part + 1}/{parts} of {config.output}"
    with part_work(config, wish.begun(), part, parts) as (folder, work):
        if (folder / "manifest.json").exists():
            return f"{title}: all parts are merged; `merge` gives the shard its name"
        refuse_foreign(made_files(config.output).values())
        job = wish.job(folder, parts, work)
        with ProcessPool(job) as pool:
            if job.scans and not work.has(DECIDED):
                scan(job, part, pool)
                return f"{title}: scanned; once all parts are, `merge` decides which documents stay"
            encode(job, part, pool)
    return f"{title}: encoded; once all parts are, `merge` writes the shard"


def merge(config: PrepareConfig) -> str:
    """Do what needs all parts, which must be through with their stage; returns in words what came of it."""
    wish = Wish.of(config)
    already = _done(wish, merges=True)
    if already is not None:
        return already
    with whole_work(config, wish.begun(), _parts_begun(config)) as (folder, work, parts):
        if not (folder / "manifest.json").exists():
            refuse_foreign(made_files(config.output).values())
            job = wish.job(folder, parts, work)
            with ProcessPool(job) as pool:
                if job.scans and not work.has(DECIDED):
                    _need_all(job, "scan")
                    decide(job, pool)
                    return f"{config.output}: decided which documents stay; run each of the {parts} parts again"
                _need_all(job, "encode")
                assemble(job, wish.tokenizer, wish.settings, pool)
        made = publish(config.output, folder)
    return summary(config.output, delivered(config, made, wish))


def _done(wish: Wish, *, merges: bool) -> str | None:
    """Of a shard that is done, in words; it may lie on another machine's disk. ``merges``: do what is left to do."""
    config = wish.config
    if config.work is not None and config.upload is None:
        raise PrepareError(
            f"work.address={config.work.address}: parts on machines that share no disk see nowhere that the shard is "
            "done; give upload, where its receipt says so"
        )
    already = finished(config.output, wish.plan, wish.settings)
    if already is not None:
        return summary(config.output, delivered(config, already, wish) if merges else already)
    if config.work is not None and wish.uploaded is not None:
        if merges:
            clear_work(config, wish.begun())
        return f"{summary(config.output, wish.uploaded)}, on another machine, and at {config.upload}"
    return None


def _parts_begun(config: PrepareConfig) -> int:
    """Raises PrepareError where there are none, so that nothing is begun by asking."""
    parts = parts_begun(config)
    if parts is None:
        raise PrepareError(f"{config.output}: no part of it is begun; `prepare CONFIG --part i/N` does that")
    return parts


def _need_all(job: Job, stage: str) -> None:
    missing = [str(part + 1) for part in range(job.count) if not is_done(job, stage, part)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise PrepareError(
            f"{job.config.output}: of {job.count} parts {', '.join(missing[:_NAMED])}{more} are not through with "
            f"`{stage}`; run `prepare CONFIG --part i/{job.count}` for each of them"
        )

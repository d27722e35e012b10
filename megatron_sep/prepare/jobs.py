"""Preparation by the jobs of a scheduler: each works on one part, and `merge` does what needs all of them."""

import re

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.files import read_json
from megatron_sep.prepare.assemble import assemble
from megatron_sep.prepare.decisions import decide, decided_path
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import ProcessPool
from megatron_sep.prepare.prepare import Wish
from megatron_sep.prepare.receipt import (
    PrepareError,
    finished,
    made_files,
    publish,
    refuse_foreign,
    summary,
    work_folder,
)
from megatron_sep.prepare.stages import encode, is_done, scan
from megatron_sep.prepare.upload import upload
from megatron_sep.prepare.work_folder import part_at_work, whole_at_work

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
    already = finished(config.output, wish.plan, wish.settings)
    if already is not None:
        return summary(config.output, already)
    title = f"part {part + 1}/{parts} of {config.output}"
    with part_at_work(config.output, wish.begun(), part, parts) as folder:
        if (folder / "manifest.json").exists():
            return f"{title}: all parts are merged; `merge` gives the shard its name"
        refuse_foreign(made_files(config.output).values())
        job = wish.job(folder, parts)
        with ProcessPool(job) as pool:
            if job.scans and not decided_path(job).exists():
                scan(job, part, pool)
                return f"{title}: scanned; once all parts are, `merge` decides which documents stay"
            encode(job, part, pool)
    return f"{title}: encoded; once all parts are, `merge` writes the shard"


def merge(config: PrepareConfig) -> str:
    """Do what needs all parts, which must be through with their stage; returns in words what came of it."""
    wish = Wish.of(config)
    already = finished(config.output, wish.plan, wish.settings)
    if already is not None:
        return summary(config.output, upload(config, already))
    with whole_at_work(config.output, wish.begun(), _parts_begun(config)) as (folder, parts):
        if not (folder / "manifest.json").exists():
            refuse_foreign(made_files(config.output).values())
            job = wish.job(folder, parts)
            with ProcessPool(job) as pool:
                if job.scans and not decided_path(job).exists():
                    _need_all(job, "scan")
                    decide(job, pool)
                    return f"{config.output}: decided which documents stay; run each of the {parts} parts again"
                _need_all(job, "encode")
                assemble(job, wish.tokenizer, wish.settings, pool)
        made = publish(config.output, folder)
    return summary(config.output, upload(config, made))


def _parts_begun(config: PrepareConfig) -> int:
    """Raises PrepareError where there are none, so that nothing is begun by asking."""
    path = work_folder(config.output) / "settings.json"
    if not path.exists():
        raise PrepareError(f"{config.output}: no part of it is begun; `prepare CONFIG --part i/N` does that")
    parts: int = read_json(path)["parts"]
    return parts


def _need_all(job: Job, stage: str) -> None:
    missing = [str(part + 1) for part in range(job.count) if not is_done(job, stage, part)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise PrepareError(
            f"{job.config.output}: of {job.count} parts {', '.join(missing[:_NAMED])}{more} are not through with "
            f"`{stage}`; run `prepare CONFIG --part i/{job.count}` for each of them"
        )

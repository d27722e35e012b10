"""The shard and its receipt out of what the parts have made."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sep.data.permutation import Permutation
from megatron_sep.data.shards import Shard, token_dtype, write_index
from megatron_sep.data.tokenizer import Tokenizer
from megatron_sep.files import read_json, sha256, versions, write_json
from megatron_sep.prepare.ledger import Ledger
from megatron_sep.prepare.parts import Job
from megatron_sep.prepare.pool import Pool, map_here
from megatron_sep.prepare.receipt import Manifest, PrepareError, describe, held_out_files, made_files
from megatron_sep.prepare.work import COPIED

_PACKAGES = ("megatron_sep", "tokenizers", "sentencepiece", "rensa", "pyarrow", "zstandard", "numpy")


def assemble(job: Job, tokenizer: Tokenizer, settings: Manifest, pool: Pool) -> None:
    """``manifest.json`` last. Raises PrepareError where no document is left."""
    config, folder = job.config, job.folder
    states = [read_json(path)["value"] for path in job.get_of_all("encode.json")]
    counts = _added(states)
    if not counts["documents"]:
        raise PrepareError(
            f"{config.output}: no document is left to write; the counts are in {job.get_of_all('encode.json')[0]}"
        )
    order = _write_shard(job, token_dtype(tokenizer.vocab_size))
    made = {folder / name: path for name, path in made_files(config.output).items() if (folder / name).exists()}
    tests = held_out_files(config)
    mapped = pool.map if job.work.is_shared_disk else map_here
    sums = {str(file): found for file, found in mapped(sha256, iter([*tests, *made]))}
    for path in job.get_of_all("sums.json"):
        sums |= read_json(path)
    manifest = {
        **describe(config, job.plan, counts, sums),
        "order": order,
        "separators": job.separators,
        "tokenizer": {
            "sha256": sha256(config.tokenizer.path),
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "held_out": [{"path": str(file), "sha256": sums[str(file)]} for file in tests],
        "files": {path.name: {"bytes": file.stat().st_size, "sha256": sums[str(file)]} for file, path in made.items()},
        "settings": settings,
        "versions": versions(*_PACKAGES),
    }
    write_json(folder / "manifest.json", manifest)


def _added(states: list[Manifest]) -> Manifest:
    """The counts of all parts together."""
    return {
        "documents": sum(state["documents"] for state in states),
        "separators": sum(state["separators"] for state in states),
        "largest_gap": max(state["largest_gap"] for state in states),
        "sources": [_added_source(source) for source in zip(*(state["sources"] for state in states), strict=True)],
    }


def _added_source(counts: tuple[Manifest, ...]) -> Manifest:
    dropped: dict[str, int] = {}
    for count in counts:
        for reason, times in count["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + times
    numbers = {key: sum(count[key] for count in counts) for key in counts[0] if key != "dropped"}
    return {key: dropped if key == "dropped" else numbers[key] for key in counts[0]}


def _write_shard(job: Job, dtype: type[np.integer[Any]]) -> str:
    """``shard.bin``, ``shard.idx`` and the report; returns how the documents are ordered."""
    config, folder = job.config, job.folder
    if config.decontaminate.paths:
        _join(job.get_of_all("scan.contamination"), folder / "contamination.jsonl")
    tokens, found = _joined(job)
    lengths: npt.NDArray[np.int32] = np.memmap(found, np.int32, "r")
    if not config.shuffle:
        write_index(folder / "shard.idx", lengths, dtype)
        _link(tokens, folder / "shard.bin")
        return "as read"
    write_index(folder / "encode.idx", lengths, dtype)
    source, count = Shard(folder / "encode.idx", [tokens]), len(lengths)
    order = Permutation(count, config.seed)(np.arange(count))
    with (folder / "shard.bin").open("wb") as file:
        for document in order.tolist():
            file.write(source.document(document).tobytes())
        file.flush()
        os.fsync(file.fileno())
    write_index(folder / "shard.idx", lengths[order], dtype)
    return f"drawn from seed {config.seed}"


def _joined(job: Job) -> tuple[Path, Path]:
    """Tokens and lengths of all parts; a part's go once they count here, so that one part at most lies twice."""
    files = {name: list(job.of_all_parts(f"encode.{name}")) for name in ("bin", "lengths")}
    if job.count == 1:
        bin_, lengths = (job.work.path(names[0]) for names in files.values())
        if bin_ is not None and lengths is not None:
            return bin_, lengths
    with Ledger(job.folder, f"joined{job.work.name}", tuple(files), {"parts": 0}) as ledger:
        for part in range(ledger.value["parts"], job.count):
            for name, names in files.items():
                for piece in job.work.pieces(names[part]):
                    ledger.append(name, piece)
            ledger.value["parts"] = part + 1
            ledger.commit()
            job.work.joined(files["bin"][part])
        return ledger.path("bin"), ledger.path("lengths")


def _join(sources: list[Path], target: Path) -> None:
    """All of some files as one; of a single one a second name. It is flushed with the rest of the folder's files."""
    if len(sources) == 1:
        _link(sources[0], target)
        return
    with target.open("wb") as file:
        for source in sources:
            with source.open("rb") as piece:
                shutil.copyfileobj(piece, file, COPIED)
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, name: Path) -> None:
    """A second name for a file, also where an earlier try has made it."""
    name.unlink(missing_ok=True)
    os.link(source, name)

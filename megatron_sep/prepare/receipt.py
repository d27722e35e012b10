"""The receipt of a prepared shard, and the names it gets when it is whole."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.data.shards import beside, bin_path, idx_path, manifest_path
from megatron_sep.errors import UserError
from megatron_sep.files import read_json, remove, sha256, written_aside
from megatron_sep.prepare.readings import Reading, expand

Manifest = dict[str, Any]


class PrepareError(UserError):
    """An output that is in the way, or a run that cannot go on."""


def made_files(output: Path) -> dict[str, Path]:
    """Name in the work folder of each file that is made, and its name in the end."""
    report = beside(output, ".contamination.jsonl")
    return {"shard.bin": bin_path(output), "shard.idx": idx_path(output), "contamination.jsonl": report}


def describe(config: PrepareConfig, plan: Sequence[Reading], counts: Manifest, sums: Mapping[str, str]) -> Manifest:
    """Counts, sources and separators; nothing of it depends on when, where or by how many processes it was made."""
    sources = counts["sources"]
    tokens = sum(source["tokens"] for source in sources)
    found = {key: counts[key] for key in ("separators", "largest_gap")}
    return {
        "documents": totals(sources),
        "tokens": tokens,
        "separator_density": found["separators"] / tokens,
        "largest_gap": found["largest_gap"],
        "sources": [
            {
                "name": source.name or source.paths[0],
                "weight": source.weight,
                **count,
                "files": [
                    {"path": str(r.file), "bytes": r.size, "sha256": sums[str(r.file)]}
                    for r in plan
                    if r.repeat == 0 and r.source == number
                ],
            }
            for number, (source, count) in enumerate(zip(config.sources, sources, strict=True))
        ],
    }


def totals(sources: Sequence[Manifest]) -> Manifest:
    """Documents of all sources: read + repeated = written + dropped. Raises PrepareError where that is not so."""
    dropped: dict[str, int] = {}
    for source in sources:
        for reason, times in source["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + times
    added: Manifest = {key: sum(source[key] for source in sources) for key in ("read", "written", "repeated")}
    if added["read"] + added["repeated"] != added["written"] + sum(dropped.values()):
        raise PrepareError(f"the counts do not add up, which is a fault of this program: {added}, dropped {dropped}")
    return {**added, "dropped": dict(sorted(dropped.items()))}


def summary(output: Path, manifest: Manifest) -> str:
    """The receipt in a few lines, for a person."""
    documents = manifest["documents"]
    dropped = ", ".join(f"{times} {reason}" for reason, times in documents["dropped"].items()) or "none"
    return "\n".join(
        [
            f"{output}: {documents['written']:,} documents, {manifest['tokens']:,} tokens",
            f"  read {documents['read']:,}, repeated {documents['repeated']:,}, dropped: {dropped}",
            f"  separators: {manifest['separator_density']:.2%} of the tokens, at most {manifest['largest_gap']} apart",
            *(
                f"  {source['name']}: {source['written']:,} documents, weight {source['weight']:g}, "
                f"{source['tokens'] / manifest['tokens']:.1%} of the tokens"
                for source in manifest["sources"]
            ),
            f"  receipt: {manifest_path(output)}",
        ]
    )


def settings_of(config: PrepareConfig, plan: Sequence[Reading]) -> Manifest:
    """All that the result depends on, but the contents of the files."""
    chosen = config.model_dump(mode="json", exclude={"workers", "memory", "output", "upload", "work"})
    sizes = {str(reading.file): reading.size for reading in plan}
    return {**chosen, "files": sizes | {str(file): file.stat().st_size for file in held_out_files(config)}}


def held_out_files(config: PrepareConfig) -> list[Path]:
    """The test sets that documents are compared with."""
    paths = config.decontaminate.paths
    return expand(paths, "decontaminate.paths") if paths else []


def finished(output: Path, plan: Sequence[Reading], settings: Manifest) -> Manifest | None:
    """The manifest where the shard is done already. Raises PrepareError where another one is in its place."""
    path = manifest_path(output)
    if not path.exists() or work_folder(output).exists():
        return None
    manifest = _read_manifest(path)
    sums = {file["path"]: file["sha256"] for source in manifest.get("sources", []) for file in source["files"]}
    touched = {r.file for r in plan if r.file.stat().st_mtime > path.stat().st_mtime}
    changed = difference(manifest.get("settings"), settings)
    changed += [name for name in manifest.get("files", {}) if not (output.parent / name).exists()]
    changed += [str(file) for file in sorted(touched) if sums.get(str(file)) != sha256(file)]
    if changed:
        raise PrepareError(
            f"{path}: was made with other settings or text ({', '.join(changed)}); choose another output, or remove it"
        )
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        found: Manifest = read_json(path)
    except ValueError as error:
        raise PrepareError(f"{path}: is no receipt: {error}; choose another output, or remove it") from error
    return found


def work_folder(output: Path) -> Path:
    """Where a shard grows."""
    return beside(output, ".work")


def refuse_foreign(paths: Iterable[Path]) -> None:
    """Raise PrepareError for a file that is there already: without a receipt nobody knows whose it is."""
    there = [str(path) for path in paths if path.exists()]
    if there:
        raise PrepareError(
            f"{', '.join(there)}: is there already and has no receipt of `prepare`; choose another output, or remove it"
        )


def publish(output: Path, folder: Path) -> Manifest:
    """Give the finished files their names, the manifest last, and clear the work folder."""
    ready = {folder / name: path for name, path in made_files(output).items() if (folder / name).exists()}
    refuse_foreign(ready.values())
    for made, path in ready.items():
        made.replace(path)
    with written_aside(manifest_path(output)) as aside:
        shutil.copyfile(folder / "manifest.json", aside)
    waste = folder.with_name(folder.name + ".done")  # half a work folder must never be taken for work in progress
    remove(waste)
    folder.replace(waste)
    remove(waste)
    return _read_manifest(manifest_path(output))


def difference(old: Any, new: Manifest) -> list[str]:
    """Keys whose values are not the same."""
    return [key for key in new if key not in (old or {}) or json.dumps(old[key]) != json.dumps(new[key])]

"""Every setting of `prepare`: text in, one shard and its manifest out."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.config.section import PositiveInt, Section, Seed

OBJECT_STORES = ("s3", "s3a", "gs", "gcs")
"""Schemes of addresses at which a file is there whole or not at all, whoever is killed while it is written."""
_WHY_NOT = {
    "memory": "is the memory of one process, which no other sees",
    "file": "is a disk; one that all machines see needs no setting, leave work out",
    "local": "is a disk; one that all machines see needs no setting, leave work out",
}


class TextSourceConfig(Section):
    """Files that belong together."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files, folders (all of their text, deep) and globs: .txt, .jsonl, .parquet, the first two also .gz and .zst.

    An address such as s3://bucket/text/*.jsonl is read through fsspec.
    """
    name: str | None = None
    """For the manifest; null: the first path."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often each document is written: 2 writes it twice, 0.5 one of two, chosen by the seed."""
    field: str = "text"
    """JSON key or parquet column of the text."""


class DeduplicateConfig(Section):
    """Drop documents that repeat others; the first of them stays."""

    exact: bool = False
    """Drop a document whose text came before."""
    near: bool = False
    """Drop a document that is close to one that is kept (MinHash LSH)."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.87
    """Jaccard similarity of the shingles from which two documents are near duplicates; the Pile's is 0.87."""
    shingle: PositiveInt = 3
    """Words of a shingle; words are what white space separates."""
    permutations: Annotated[int, Field(ge=16, le=4096)] = 512
    """Values of a signature; the standard error of a similarity of 0.87 is 0.34 / sqrt(permutations)."""
    rows: PositiveInt = 8
    """Values of a band; two documents are compared where all values of one band agree."""

    @model_validator(mode="after")
    def _a_band_fits(self) -> Self:
        if self.rows > self.permutations:
            raise ValueError(f"rows={self.rows} is above permutations={self.permutations}: no band fits a signature")
        return self


class DecontaminateConfig(Section):
    """Drop documents that share a run of words with a test set."""

    paths: tuple[str, ...] = ()
    """Test sets, in the formats of the sources; none: nothing is dropped."""
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    """JSON keys of their text, each looked up on its own; a record without any of them is bad input."""
    words: Annotated[int, Field(ge=2)] = 13
    """Length of the run, in lower-case words of letters and digits."""
    matches: PositiveInt = 1
    """Runs a document must share to be dropped."""


class WorkConfig(Section):
    """Where work in progress lies that machines without a shared disk do together."""

    address: str
    """Folder of an object store, as s3://bucket/work; the work lies in NAME.work there, NAME being the output's."""
    scratch: Path | None = None
    """Folder on each machine's own disk for what is fetched and mapped; null: its TMPDIR, or /tmp."""

    @field_validator("address")
    @classmethod
    def _puts_files_whole(cls, value: str) -> str:
        scheme, found, _ = value.partition("://")
        if not found:
            raise ValueError(f"{value}: is no address such as s3://bucket/work; on a disk that all see leave work out")
        if scheme not in OBJECT_STORES:
            why = _WHY_NOT.get(scheme, "is not known to show a file when it is whole and not before")
            raise ValueError(f"{value}: {scheme}:// {why}; give an address of {', '.join(OBJECT_STORES)}")
        return value.rstrip("/")


class PrepareConfig(Section):
    """One shard: OUTPUT.bin, OUTPUT.idx and OUTPUT.manifest.json."""

    output: Path
    """Prefix of the shard, a path; work in progress lies in OUTPUT.work and is gone when the shard is done."""
    upload: str | None = None
    """Folder at an address, as s3://bucket/shards, to which the finished shard is copied; no part of the result."""
    work: WorkConfig | None = None
    """Of machines without a shared disk; null: work lies in OUTPUT.work, which all see. No part of the result."""
    tokenizer: TokenizerConfig
    sources: Annotated[tuple[TextSourceConfig, ...], Field(min_length=1)]
    on_bad: Literal["fail", "skip"] = "fail"
    """A record that cannot be read or has no text: stop, naming file and line, or leave it out and count it."""
    on_blank: Literal["fail", "skip"] = "skip"
    """A document of white space alone."""
    max_bytes: PositiveInt = 50_000_000
    """A longer record is bad input."""
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation of each document before anything else."""
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    shuffle: bool = False
    """Write the documents in an order drawn from the seed, so that each split has some of every source."""
    seed: Seed = 1234
    workers: PositiveInt | None = None
    """Processes; null: one a core. The result does not depend on it."""
    memory: Annotated[int, Field(ge=1)] = 2048
    """MiB for the search for duplicates, besides a byte a document in each process; no part of the result."""

    @field_validator("output", mode="before")
    @classmethod
    def _a_path(cls, value: object) -> object:
        if "://" in str(value):
            raise ValueError(
                f"{value}: a shard grows on a disk that all who work on it see; give a path, and the address as upload"
            )
        return value

    @field_validator("upload")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError(f"{value}: is no address such as s3://bucket/shards; where a path is meant, give output")
        return value

    @model_validator(mode="after")
    def _text_that_all_see(self) -> Self:
        for number, source in enumerate(self.sources if self.work else ()):
            for path in source.paths:
                if "://" not in path or path.startswith("memory://"):
                    raise ValueError(
                        f"sources[{number}].paths: {path} is not seen by all machines, as work.address says there is "
                        "no shared disk; give an address, as s3://bucket/text"
                    )
        return self

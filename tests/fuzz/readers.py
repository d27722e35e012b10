"""Every reader of a file that somebody else may have made, with a small valid input of it."""

import gzip
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz.bounded import Reader

_MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "sequence_length": 32}
_WORDS = ("alpha", "beta,", "gamma.", "delta", "one", "Ünï", "two;", "is", "not\n", "more")


def _texts(count: int = 12) -> list[str]:
    random = Random(0)
    return [" ".join(random.choices(_WORDS, k=30)) for _ in range(count)]


def _jsonl(compress: Callable[[bytes], bytes], suffix: str, folder: Path) -> list[Path]:
    path = folder / f"text.jsonl{suffix}"
    path.write_bytes(
        compress("".join(json.dumps({"text": t, "meta": {"x": [1, 2]}}) + "\n" for t in _texts()).encode())
    )
    return [path]


def _zstd(data: bytes) -> bytes:
    from zstandard import ZstdCompressor

    return ZstdCompressor().compress(data)


def _parquet(folder: Path) -> list[Path]:
    import pyarrow
    import pyarrow.parquet

    path = folder / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": _texts(), "id": list(range(12))}), path, row_group_size=5)
    return [path]


def _read_text(folder: Path) -> None:
    """Under both policies; what was read is what was kept and what was dropped."""
    from megatron_sep.prepare.text import Limits, Tally, TextError, read_documents

    (path,) = folder.iterdir()
    tally = Tally()
    kept = sum(1 for _ in read_documents(path, Limits(on_bad="skip", max_bytes=5000), tally))
    if tally.read != kept + tally.dropped.total():
        raise AssertionError(f"{tally} does not add up to {kept} kept")
    with suppress(TextError):
        list(read_documents(path, Limits(on_blank="fail", max_bytes=5000)))


def _instructions(folder: Path) -> list[Path]:
    _make_tokenizer(folder)
    path = folder / "instructions.jsonl"
    path.write_text("".join(json.dumps({"prompt": t[:40], "response": t[40:80]}) + "\n" for t in _texts()))
    return [path]


def _read_instructions(folder: Path) -> None:
    from megatron_sep.config.schema import InstructionsConfig
    from megatron_sep.data.instructions import instructions_of
    from megatron_sep.data.tokenizer import load_tokenizer

    config = InstructionsConfig(path=folder / "instructions.jsonl", on_long="drop")
    samples = instructions_of(config, "train", 64, load_tokenizer(folder / "tokenizer.json"), 0, True)
    samples.take(0, 4)


def _make_tokenizer(folder: Path) -> list[Path]:
    path = folder / "tokenizer.json"
    shutil.copyfile(_kept_tokenizer(), path)
    return [path]


@cache
def _kept_tokenizer() -> Path:
    """A byte-level BPE of 280 tokens; training one takes longer than reading many."""
    import tempfile

    from megatron_sep.data.tokenizer import train_tokenizer

    path = Path(tempfile.mkdtemp(prefix="fuzz-")) / "tokenizer.json"
    train_tokenizer(_texts(), 280, path)
    return path


def _vocabulary(folder: Path) -> list[Path]:
    """GPT-2's two files."""
    _make_tokenizer(folder)
    found = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(found["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in found["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    return [folder / "vocab.json", folder / "merges.txt"]


def _sentencepiece(folder: Path) -> list[Path]:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts() * 5), model_writer=model, vocab_size=30, byte_fallback=False, minloglevel=9
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return [folder / "tokenizer.model"]


def _read_tokenizer(name: str, folder: Path) -> None:
    from megatron_sep.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder / name, None if name != "vocab.json" else "<|endoftext|>")
    for text in (*_texts(2), "", "\u4e2d\u00a0x<|endoftext|>"):
        ids = tokenizer.encode(text)
        tokenizer.decode(ids)
        tokenizer.encode_plain(text)
    for mark in ".,;?!:\t\n ":
        tokenizer.token_ids(mark)


def _shard(folder: Path) -> list[Path]:
    from megatron_sep.data.shards import write_shards

    random = Random(0)
    write_shards(folder / "corpus", [random.choices(range(1, 280), k=random.randint(0, 60)) for _ in range(20)], 280)
    return [folder / "corpus.idx", folder / "corpus.idx", folder / "corpus.bin"]


def _read_shard(folder: Path) -> None:
    """Every document, and rows of samples with ids checked against the vocabulary."""
    from megatron_sep.config.schema import DataConfig
    from megatron_sep.data.open_data import open_samples
    from megatron_sep.data.shards import Shard

    shard = Shard.open(folder / "corpus")
    total = sum(len(shard.document(number)) for number in range(shard.num_documents))
    if total != shard.num_tokens:
        raise AssertionError(f"documents of {total} tokens, {shard.num_tokens} in all")
    data = DataConfig.model_validate({"path": str(folder / "corpus"), "split": [1, 0, 0]})
    open_samples(data, "train", 16, 280, 8).take(0, 8)


def _receipt(folder: Path) -> list[Path]:
    _shard(folder)
    manifest = {
        "settings": {"tokenizer": {"path": str(folder / "tokenizer.json")}},
        "tokenizer": {"sha256": "0" * 64, "vocab_size": 280},
        "documents": {"read": 20, "written": 20},
    }
    (folder / "corpus.manifest.json").write_text(json.dumps(manifest))
    return [folder / "corpus.manifest.json"]


def _read_receipt(folder: Path) -> None:
    from megatron_sep.config.schema import DataConfig
    from megatron_sep.data.samples import DataError
    from megatron_sep.data.shard_tokenizer import check_tokenizer, unknown_tokenizers

    sources = DataConfig.model_validate({"path": str(folder / "corpus")}).sources
    path = _kept_tokenizer()
    unknown_tokenizers(sources, path)
    with suppress(DataError):  # the valid input names another tokenizer
        check_tokenizer(sources, path)


def _sums(folder: Path) -> list[Path]:
    from megatron_sep.files import sha256

    _shard(folder)
    names = ("corpus.bin", "corpus.idx")
    (folder / "sums").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))
    return [folder / "sums"]


def _read_sums(folder: Path) -> None:
    from megatron_sep.data.pile import summary, verify

    summary(verify(folder / "corpus", folder / "sums", workers=1))


def _hugging_face(kind: str, folder: Path) -> list[Path]:
    """A directory with random weights under Hugging Face's names, whole or sharded."""
    import torch
    from safetensors.torch import save_file

    from megatron_sep.config.schema import ModelConfig
    from megatron_sep.weights.hugging_face import make_config
    from megatron_sep.weights.names import groups, weight_shapes

    model = ModelConfig(**_MODEL, vocab_size=64)
    (folder / "config.json").write_text(json.dumps(make_config(model, 64, {}, "float32", None)))
    shapes, generator = weight_shapes(model, 64), torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for link in (link for group in groups(model) for link in group):
        whole = torch.randn(shapes[link.ours], generator=generator)
        parts = [whole] if len(link.theirs) == 1 else link.split(whole, model)
        tensors |= {name: part.contiguous() for name, part in zip(link.theirs, parts, strict=True)}
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "old bin":
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif kind == "index":
        save_file(tensors, folder / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return [folder / "model.safetensors.index.json"]
    else:
        save_file(tensors, folder / "model.safetensors")
    weights = next(path for path in folder.iterdir() if path.name != "config.json")
    return [folder / "config.json"] if kind == "config" else [weights]


def _layers(folder: Path) -> list[Path]:
    """GPT-NeoX's files of layers in two parts."""
    import torch

    from megatron_sep.config.schema import ModelConfig
    from megatron_sep.weights.names import groups, weight_shapes

    model = ModelConfig(**_MODEL, vocab_size=64)
    shapes, files = weight_shapes(model, 64), dict[int, dict[str, Any]]()
    outer = {"gpt_neox.embed_in": (0, "word_embeddings"), "gpt_neox.final_layer_norm": (5, "norm")}
    outer["embed_out"] = (6, "final_linear")
    for link in (link for group in groups(model) for link in group):
        (name,) = link.theirs
        module, _, part = name.rpartition(".")
        if module in outer:
            layer, key = outer[module][0], f"{outer[module][1]}.{part}"
        else:
            number, _, key = name.removeprefix("gpt_neox.layers.").partition(".")
            layer = int(number) + 2
        files.setdefault(layer, {})[key] = torch.zeros(shapes[link.ours])
    for layer, tensors in files.items():
        torch.save(tensors, folder / f"layer_{layer:02d}-model_00-model_states.pt")
    return sorted(folder.iterdir())


def _read_weights(config: dict[str, Any] | None, folder: Path) -> None:
    from megatron_sep.config.schema import ModelConfig
    from megatron_sep.weights.open_source import open_source

    for group in open_source(folder, None if config is None else ModelConfig(**config)):
        if not all(weight.numel() for weight in group.values()):
            raise AssertionError("a weight without a number")


def _checkpoint(names: tuple[str, ...], folder: Path) -> list[Path]:
    """The checkpoint of format 1 in tests/fixtures."""
    fixture = Path(__file__).parents[1] / "fixtures" / "run-of-format-1" / "checkpoints" / "step-00000004"
    shutil.copytree(fixture, folder, dirs_exist_ok=True)
    return [folder / name for name in names]


def _seal(folder: Path) -> None:
    """Sums as a hostile author would make them."""
    from megatron_sep.files import sha256

    with suppress(Exception):  # of a manifest that is none
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, record in manifest["files"].items():
            record |= {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        text = json.dumps(manifest)
        if json.loads((folder / "manifest.json").read_text()) != manifest:
            (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(sha256(folder / "manifest.json"))


def _read_checkpoint(folder: Path) -> None:
    from megatron_sep.weights.open_source import open_source

    source = open_source(folder)
    for _ in source:
        pass


_RUN: dict[str, Any] = {
    "dir": "runs/x",
    "model": _MODEL,
    "attention": {"window": 8, "sinks": 2, "separators": [".", ","], "full_layers": [0]},
    "tokenizer": {"path": "tokenizer.json"},
    "data": {"path": "corpus", "split": [0.9, 0.1, 0]},
    "train": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "checkpoint": {"every": 3, "keep": None},
}
_NEOX = """{
  "num-layers": 2, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 32, "max-position-embeddings": 32,
  "pos-emb": "rotary", "rotary-pct": 0.25, "no-weight-tying": true, "gpt-j-residual": true,
  "train_iters": 20, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "lr-decay-iters": 20,
  "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.95], "eps": 1.0e-8}}, "min_lr": 0.0001,
  "zero_optimization": {"stage": 1}, "fp16": {"enabled": true, "loss_scale": 0}, "warmup": 0.01,
  "data_path": "corpus", "vocab_file": "tokenizer.json", "tokenizer_type": "HFTokenizer", "split": "969,30,1",
  "save": "runs/x", "separator_token_ids": [15, 13], "prefill_local_window_size": 8,
}
"""
_PREPARE = {
    "output": "out",
    "tokenizer": {"path": "tokenizer.json"},
    "sources": [{"paths": ["a.jsonl", "b/*.txt"], "weight": 1.5, "field": "text"}],
    "deduplicate": {"exact": True, "near": True},
    "on_bad": "skip",
}


def _yaml(text: str, folder: Path) -> list[Path]:
    (folder / "run.yaml").write_text(text)
    return [folder / "run.yaml"]


def _read_yaml(kind: str, folder: Path) -> None:
    from megatron_sep.config.load import load, load_config, neox_notes, sketch_config
    from megatron_sep.config.prepare import PrepareConfig

    path = folder / "run.yaml"
    if kind == "prepare":
        load(PrepareConfig, path)
        return
    if kind == "neox":
        neox_notes(path)
        sketch_config(path)
    load_config(path, ["dir=x"] if kind == "neox" else [])


def _metrics(folder: Path) -> list[Path]:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i, "time": i, "train/loss": 7.0 - i / 9}) + "\n" for i in range(1, 30)))
    return [path]


def _read_metrics(folder: Path) -> None:
    from megatron_sep.report.follow import Follower

    follower = Follower(folder)
    follower.look({})
    for row in follower.rows:
        for number in row.values():
            0.0 if number is None else number + 0.0


READERS: dict[str, Reader] = {
    "jsonl": Reader(partial(_jsonl, bytes, ""), _read_text),
    "jsonl.gz": Reader(partial(_jsonl, gzip.compress, ".gz"), _read_text, copies=1100),
    "jsonl.zst": Reader(partial(_jsonl, _zstd, ".zst"), _read_text, copies=1100),
    "parquet": Reader(_parquet, _read_text),
    "instructions": Reader(_instructions, _read_instructions),
    "tokenizer.json": Reader(_make_tokenizer, partial(_read_tokenizer, "tokenizer.json")),
    "vocab.json and merges.txt": Reader(_vocabulary, partial(_read_tokenizer, "vocab.json")),
    "sentencepiece .model": Reader(_sentencepiece, partial(_read_tokenizer, "tokenizer.model")),
    ".idx and .bin": Reader(_shard, _read_shard),
    "receipt of a shard": Reader(_receipt, _read_receipt),
    "list of sums": Reader(_sums, _read_sums),
    "safetensors": Reader(partial(_hugging_face, "safetensors"), partial(_read_weights, None)),
    "index of safetensors": Reader(partial(_hugging_face, "index"), partial(_read_weights, None)),
    "config.json": Reader(partial(_hugging_face, "config"), partial(_read_weights, None)),
    "pytorch_model.bin": Reader(partial(_hugging_face, "bin"), partial(_read_weights, None)),
    "pytorch_model.bin before 1.6": Reader(partial(_hugging_face, "old bin"), partial(_read_weights, None)),
    "layers of GPT-NeoX": Reader(_layers, partial(_read_weights, _MODEL)),
    "manifest of a checkpoint": Reader(partial(_checkpoint, ("manifest.json",)), _read_checkpoint, _seal),
    ".metadata of a checkpoint": Reader(partial(_checkpoint, (".metadata",)), _read_checkpoint, _seal),
    "tensors of a checkpoint": Reader(partial(_checkpoint, ("__0_0.distcp", "__0_1.distcp")), _read_checkpoint, _seal),
    "YAML": Reader(partial(_yaml, yaml.safe_dump(_RUN)), partial(_read_yaml, "run")),
    "YAML of GPT-NeoX": Reader(partial(_yaml, _NEOX), partial(_read_yaml, "neox")),
    "YAML of prepare": Reader(partial(_yaml, yaml.safe_dump(_PREPARE)), partial(_read_yaml, "prepare")),
    "metrics.jsonl": Reader(_metrics, _read_metrics),
}

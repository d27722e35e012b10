"""Shared by all tests: one process group for the whole session, and small models."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from support import forked
from support.cases import load_profile
from support.order import place

from megatron_sep.config.schema import ParallelConfig, RunConfig

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the fused kernels' interpreter, chosen before anything imports Triton

SENTENCES = (
    "The cat sat, as cats do; the dog barked!",
    "Is this it?\tYes: it is.\n",
    "Numbers such as 12, 34 and 5678 stand in lines.\nAnd lines end.\n\n",
    "Ünïcödé is text too — “quoted”.\n",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all random cases, the whole quickstart and long proofs at length"
    )


def pytest_configure(config: pytest.Config) -> None:
    load_profile(config.getoption("full"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: place(item.path))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run `make gpu` on a machine with one"))


def pytest_collection_finish() -> None:
    """What was imported is no garbage: megatron-core collects at each save, and would walk through all of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Before the first test, in each process that has any."""
    if getattr(session, "items", ()):
        forked.begin()


def pytest_sessionfinish() -> None:
    forked.end()
    gc.unfreeze()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Several processes of tests share a GPU: none keeps memory for its next test."""
    if "gpu" in item.keywords and torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """A job of one process with megatron-core's groups."""
    from megatron_sep.parallel.groups import process_groups

    with process_groups(ParallelConfig(), seed=1):
        yield


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens."""
    from megatron_sep.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(SENTENCES * 20, 400, path)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tokenizer.json and the shard corpus.bin/.idx: 60 documents of made-up sentences."""
    from megatron_sep.data.shards import write_shards
    from megatron_sep.data.tokenizer import train_tokenizer

    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "is", "not", "more", "than"]
    random = Random(0)

    def sentence() -> str:
        return " ".join(random.choices(words, k=random.randint(3, 12))) + random.choice(".,;?!\n")

    texts = [" ".join(sentence() for _ in range(40)) for _ in range(60)]
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(texts, 300, folder / "tokenizer.json")
    write_shards(folder / "corpus", [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts], 300)
    return folder


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes configurations of a 2-layer SepLLM run of 8 steps on ``corpus``; a keyword replaces keys of its section."""

    def make(**sections: dict[str, Any]) -> RunConfig:
        tree: dict[str, Any] = {
            "dir": str(tmp_path / "run"),
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "sequence_length": 64},
            "attention": {"window": 8, "sinks": 2, "separators": "default", "full_layers": [0]},
            "tokenizer": {"path": str(corpus / "tokenizer.json")},
            "data": {"path": str(corpus / "corpus"), "split": [0.9, 0.1, 0]},
            "train": {
                "steps": 8,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "precision": "fp32",
                "eval_every": 4,
                "eval_batches": 2,
            },
            "optimizer": {"lr": 1e-3, "min_lr": 1e-4, "warmup": 0.2},
            "checkpoint": {"every": 4},
            "metrics": {"every": 1},
        }
        for name, section in sections.items():
            tree[name] = tree.get(name, {}) | section if isinstance(section, dict) else section
        return RunConfig.model_validate(tree)

    return make


@pytest.fixture
def no_compilations() -> None:
    """What other tests compiled of the same function is forgotten: torch counts it towards one limit."""
    torch.compiler.reset()

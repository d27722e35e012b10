"""A model of transformers with random weights, on disk with a tokenizer."""

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """2 layers, 400 tokens, trained on 128."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=128,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def pattern_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SepLLM with a short window."""
    file = tmp_path_factory.mktemp("pattern") / "pattern.yaml"
    file.write_text("attention: {window: 4, sinks: 1, separators: default}\n")
    return file


@pytest.fixture(scope="session")
def full_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention."""
    file = tmp_path_factory.mktemp("pattern") / "full.yaml"
    file.write_text("attention: {window: null}\n")
    return file

"""A tokenizer whose texts end otherwise than GPT-NeoX's, as Llama-3's do, goes with its weights wherever they go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import hugging_face, llama_config

from megatron_sep.config import RunConfig
from megatron_sep.convert.convert import convert
from megatron_sep.data.tokenizer import TokenizerError
from megatron_sep.evaluate.texts import know
from megatron_sep.generate.load import load
from megatron_sep.parallel.groups import topology
from megatron_sep.report.verify import verify
from megatron_sep.weights.hugging_face import HuggingFaceError

pytestmark = pytest.mark.usefixtures("single_process")
END = "<|end_of_text|>"


def with_tokenizer(folder: Path, tokenizer: Path, eos_token: Any) -> Path:
    """A Llama whose tokenizer ends texts with END, in the place of <|endoftext|>."""
    model = hugging_face(llama_config())
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.read_text().replace("<|endoftext|>", END))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    return folder


def end_of(folder: Path) -> str:
    """As `generate` has it; `eval` has the same."""
    opened = load(folder, torch.device("cpu")).tokenizer
    known = know(folder).tokenizer
    assert known.eod_id == opened.eod_id
    return opened.decode([opened.eod_id])


@pytest.mark.parametrize("eos_token", [END, {"content": END, "special": True}])
def test_a_hugging_face_directory_says_it(tmp_path: Path, corpus: Path, eos_token: Any) -> None:
    """In tokenizer_config.json, in either way of writing it, and what it is converted to keeps it."""
    folder = with_tokenizer(tmp_path / "llama", corpus / "tokenizer.json", eos_token)
    convert(folder, tmp_path / "start")
    convert(tmp_path / "start", tmp_path / "export")
    assert [end_of(tmp_path / name) for name in ("llama", "start", "export")] == [END] * 3
    assert "vocabulary 300" in next(verify(folder, None, topology()))  # opened as the others


def test_a_run_says_it(tiny: Callable[..., RunConfig], tmp_path: Path, corpus: Path) -> None:
    """What was trained with `tokenizer.eod` needs no word of it later, and neither does its export."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    path = tmp_path / "tokenizer.json"
    path.write_text((corpus / "tokenizer.json").read_text().replace("<|endoftext|>", END))
    settings = {"steps": 2, "eval_every": 0}
    config = tiny(tokenizer={"path": str(path), "eod": END}, train=settings)
    train(build_run(config, topology()))
    convert(config.dir, tmp_path / "export")
    assert [end_of(config.dir), end_of(tmp_path / "export")] == [END] * 2


def test_what_is_not_said_or_wrong_is_refused(tmp_path: Path, corpus: Path) -> None:
    """No name, a name that is no token, and a file that is no JSON."""
    folder = with_tokenizer(tmp_path / "llama", corpus / "tokenizer.json", None)
    with pytest.raises(TokenizerError, match="none of"):
        end_of(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(TokenizerError, match=r"<\|eot\|>"):
        end_of(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(HuggingFaceError, match=r"tokenizer_config\.json: cannot be read"):
        end_of(folder)

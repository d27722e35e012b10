"""`generate`: a trained checkpoint, its export and other models, through the same cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import trained_logits
from transformers import FalconConfig, FalconForCausalLM

from megatron_sep.config import RunConfig
from megatron_sep.convert.convert import convert
from megatron_sep.generate.attach import attach
from megatron_sep.generate.interface import AttachError
from megatron_sep.generate.load import load
from megatron_sep.generate.sampler import Sampling, SamplingError
from megatron_sep.generate.session import SessionError, open_session, read_prompts
from megatron_sep.kernels import operation, registry
from megatron_sep.parallel.groups import topology
from megatron_sep.weights.hugging_face import HuggingFaceError
from megatron_sep.weights.open_source import SourceError

pytestmark = pytest.mark.usefixtures("single_process")

CPU = torch.device("cpu")


def trained(tiny: Callable[..., RunConfig], **model: Any) -> RunConfig:
    """A trained SepLLM run, H with documents kept apart."""
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    config = tiny(model=model, attention={"document_boundaries": True}, train={"steps": 4, "eval_every": 0})
    train(build_run(config, topology()))
    return config


@pytest.fixture
def run(tiny: Callable[..., RunConfig]) -> RunConfig:
    return trained(tiny)


def greedy(session: Any, prompts: list[str], tokens: int = 40, cache: Any = None) -> str:
    cache = cache or session.attachment.new_cache()
    return "".join(session.shown(prompts, Sampling(max_tokens=tokens, temperature=0), cache))


def test_what_computes_is_said_behind_the_text(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal shows both, and a text that grows is not cut by it."""
    session = open_session(run.dir, None, None, None)
    monkeypatch.setattr(operation, "_announced", set())
    registry._load.cache_clear()
    capsys.readouterr()
    shown = session.shown(["A text. "], Sampling(max_tokens=40, temperature=0), session.attachment.new_cache())
    assert not any(capsys.readouterr().err for _ in shown)
    assert "sep_decode: reference on cpu\n" in capsys.readouterr().err


def test_what_computes_is_said_once_the_last_of_several_texts_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever of them ends first."""
    monkeypatch.setattr(operation, "_announced", set())
    one, other = operation.announced_afterwards(), operation.announced_afterwards()
    one.__enter__()
    other.__enter__()
    other.__exit__(None, None, None)
    operation._announce("it computes")
    assert capsys.readouterr().err == ""
    one.__exit__(None, None, None)
    assert capsys.readouterr().err == "it computes\n"


@pytest.mark.parametrize(
    "model",
    [{}, {"position": {"kind": "bipe", "segments": "alibi", "length": 12}, "self_adjusting_softmax": {}}],
    ids=["rotary", "bipe, alibi, self-adjusting"],
)
def test_decoding_is_the_training_mask(tiny: Callable[..., RunConfig], model: dict[str, Any]) -> None:
    """Logits of a checkpoint token by token, documents included, against the model it was trained in: 1e-5."""
    run = trained(tiny, **model)
    ids = torch.randint(1, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    ids[0, 20] = ids[1, 33] = 0  # ends of documents
    loaded = load(run.dir, CPU)
    rules = loaded.rules()
    assert rules.document_end == 0
    attached = attach(loaded.model, list(rules.patterns), document_end=rules.document_end)
    cache, logits = attached.new_cache(), []
    with torch.no_grad():
        for part in ids.split([9, *[1] * 20, 31], dim=1):
            logits.append(loaded.model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), trained_logits(run, ids), atol=1e-5, rtol=1e-5)
    assert cache.retention().share < 0.8


def test_what_transformers_does_not_compute_is_not_exported(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    """ALiBi trains, generates, and is refused by name where it would be read as rotary; alone it does not run."""
    config = trained(tiny, position={"kind": "alibi"})
    session = open_session(config.dir, None, None, None)
    assert greedy(session, ["alpha is"], tokens=4).startswith("alpha is")
    with pytest.raises(HuggingFaceError, match=r"model\.position\.kind=alibi: .* `generate`"):
        convert(config.dir, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    session.attachment.detach()
    with pytest.raises(AttachError, match="has ALiBi, which transformers does not compute; call attach"):
        session.loaded.model(torch.tensor([[1, 2]]))


def test_checkpoint_and_export_say_the_same(run: RunConfig, tmp_path: Path) -> None:
    """The same text from a run's dir and from its Hugging Face export, alone and in a batch of unequal prompts."""
    convert(run.dir, tmp_path / "export")
    prompts = ["alpha is", "one two three is not more than alpha, beta;", "gamma"]
    ours, theirs = (open_session(path, None, None, None) for path in (run.dir, tmp_path / "export"))
    alone = [greedy(ours, [prompt]) for prompt in prompts]
    assert [greedy(theirs, [prompt]) for prompt in prompts] == alone
    cache = ours.attachment.new_cache()
    together = greedy(ours, prompts, cache=cache)
    assert together == "".join(f"== {number}\n{text}" for number, text in enumerate(alone, 1))
    assert "cache of 1 layers: sinks 2 + separators" in ours.cache_lines(cache)
    assert "on average a token saw" in ours.cache_lines(cache)


def test_streaming_and_another_pattern(run: RunConfig, tmp_path: Path) -> None:
    """A cache of bounded size stays so; the paper's formula stands beside what was measured; a pattern from a file."""
    session = open_session(run.dir, None, "2,4,8,20", "cache")
    cache = session.attachment.new_cache()
    greedy(session, ["alpha is not more than beta. " * 4], tokens=60, cache=cache)
    ((layers, blocks),) = cache.blocks()
    assert layers == 2
    assert sum(blocks.values()) < 20
    assert session.cache_lines(cache).endswith("(a+s+w+c)/2 = 17.0")
    assert "longer than" not in session.cache_lines(cache)
    long = open_session(run.dir, None, None, None)
    cache = long.attachment.new_cache()
    greedy(long, ["alpha is not more than beta. " * 8], tokens=60, cache=cache)
    assert "longer than the 64 tokens of training: --streaming" in long.cache_lines(cache)
    pattern = tmp_path / "pattern.yaml"
    pattern.write_text("attention: {window: 3, sinks: 1}\n")
    narrow = open_session(run.dir, pattern, None, None)
    cache = narrow.attachment.new_cache()
    greedy(narrow, ["alpha"], tokens=20, cache=cache)
    assert cache.retention().live <= 4


def test_other_architectures(run: RunConfig, tmp_path: Path) -> None:
    """A Falcon directory with a tokenizer is generated from; its separators are looked up in that tokenizer."""
    torch.manual_seed(0)
    model = FalconForCausalLM(
        FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    )
    model.save_pretrained(tmp_path / "falcon")
    with pytest.raises(SourceError, match=r"has no tokenizer.json"):
        open_session(tmp_path / "falcon", None, None, None)
    (tmp_path / "falcon" / "tokenizer.json").write_bytes(run.tokenizer.path.read_bytes())
    session = open_session(tmp_path / "falcon", None, "2,4,8,20", "text")
    assert greedy(session, ["alpha is"]).startswith("alpha is")
    assert len(session.attachment.policies[0].separator_ids) == 9  # type: ignore[union-attr]


def test_wrong_options_are_refused(run: RunConfig, tmp_path: Path) -> None:
    """No prompt, sizes that are not four numbers, a file without a pattern, a directory that is not there."""
    with pytest.raises(SessionError, match="pass --prompt TEXT or --prompts FILE"):
        read_prompts([], None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SessionError, match=r"--prompts .*binary: cannot be read"):
        read_prompts(["a"], tmp_path / "binary")
    with pytest.raises(SessionError, match=r"--positions frozen: .* pass --streaming"):
        open_session(run.dir, None, None, "frozen")
    with pytest.raises(SessionError, match="--streaming 4,64: pass four numbers"):
        open_session(run.dir, None, "4,64", "cache")
    with pytest.raises(
        SessionError, match=r"--streaming 4,64,256,300: .* must be less than capacity = 300.*pass capacity"
    ):
        open_session(run.dir, None, "4,64,256,300", "cache")
    with pytest.raises(SamplingError, match="temperature=-1: must be a finite number"):
        Sampling(temperature=-1)
    (tmp_path / "wrong.yaml").write_text("attention: {window: 0}\n")
    with pytest.raises(SessionError, match=r"(?s)wrong\.yaml: .*window"):
        open_session(run.dir, tmp_path / "wrong.yaml", None, None)
    (tmp_path / "empty.yaml").write_text("model: {}\n")
    with pytest.raises(SessionError, match="has no section `attention`"):
        open_session(run.dir, tmp_path / "empty.yaml", None, None)
    with pytest.raises(SourceError, match="no such directory"):
        open_session(tmp_path / "nowhere", None, None, None)

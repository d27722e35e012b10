"""Text from a trained checkpoint, one token at a time, each from a full forward pass under the training mask."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import ParallelConfig, RunConfig
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.model.build import build_model
from megatron_sep.parallel.groups import current_device
from megatron_sep.train import checkpoint
from megatron_sep.train.checkpoint import CheckpointError, Checkpoints
from megatron_sep.train.start import load_weights, open_source


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0: the likeliest."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    """Draw from the k likeliest; 0: from all."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens whose probabilities reach p."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"{self}: temperature and top_k must not be negative, top_p is in (0, 1], max_tokens >= 1")


@dataclass(frozen=True)
class Generator:
    """A model with what turns text into its inputs and back."""

    model: nn.Module
    rules: LayerRules
    tokenizer: Tokenizer
    sequence_length: int

    @classmethod
    def from_checkpoint(cls, path: Path) -> "Generator":
        """Open a checkpoint, or the newest complete one of a run's directory. One process. Raises CheckpointError."""
        path = _checkpoint_in(path)
        description = checkpoint.describe(path)
        config = RunConfig.model_validate(description["config"])
        tokenizer = load_tokenizer(checkpoint.tokenizer_of(path, config) or config.tokenizer.path, config.tokenizer.eod)
        model = build_model(
            config.model,
            ParallelConfig(),
            vocab_size=description["vocab_size"],
            precision=config.train.precision,
            seed=config.train.seed,
            backend=config.attention.backend,
        )
        source = open_source(path)
        load_weights(model, source, source.config)
        rules = LayerRules.of(config.attention, config.model.num_layers, tokenizer)
        return cls(model.eval(), rules, tokenizer, config.model.sequence_length)

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The continuation of ``prompt`` in pieces; it ends at the end-of-document token or after ``max_tokens``."""
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eod_id]
        start, shown = len(ids), ""
        random = torch.Generator().manual_seed(sampling.seed)
        for _ in range(sampling.max_tokens):
            ids.append(_draw(self.next_logits(ids), sampling, random))
            if ids[-1] == self.tokenizer.eod_id:
                return
            text = self.tokenizer.decode(ids[start:])
            if not text.endswith("\ufffd"):  # half of a character
                yield text[len(shown) :]
                shown = text

    @torch.no_grad()
    def next_logits(self, ids: list[int]) -> Tensor:
        """Logits over the vocabulary after ``ids``, of which the last ``sequence_length`` count: fp32 [vocab]."""
        ids_BT = torch.tensor([ids[-self.sequence_length :]], device=current_device())
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        logits_BTV: Tensor = self.model(ids_BT, position_BT, self.rules.plans(ids_BT))
        return logits_BTV[0, -1, : self.tokenizer.vocab_size].float().cpu()


def _draw(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    ordered, token = (logits / sampling.temperature).softmax(0).sort(descending=True)
    before = ordered.cumsum(0) - ordered
    keep = before < sampling.top_p
    if sampling.top_k:
        keep[sampling.top_k :] = False
    return int(token[torch.multinomial(ordered * keep, 1, generator=random)])


def _checkpoint_in(path: Path) -> Path:
    if (path / "manifest.json").is_file():
        fault = checkpoint.fault_of(path)
        if fault:
            raise CheckpointError(fault)
        return path
    newest = Checkpoints(path, keep=None).newest()
    if newest is None:
        raise CheckpointError(f"{path}: is neither a checkpoint nor the dir of a run with a complete one")
    return newest

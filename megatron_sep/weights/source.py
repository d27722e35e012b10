"""The weights of one model under our names, whatever wrote them.

Every name and shape is checked against the table of names before a single weight is handed out, one layer at a time.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_sep.config.schema import ModelConfig
from megatron_sep.weights.names import INV_FREQ, Link, groups, weight_shapes
from megatron_sep.weights.tensor_files import Files, Shape, WeightsError

_BUFFERS = re.compile(r".*(\.rotary_emb\.inv_freq|\.attention\.bias|\.attention\.masked_bias)")
"""What old checkpoints hold beside weights."""


class Source:
    """The weights of one model under our names, every name and shape checked when it is opened."""

    def __init__(self, place: Path, config: ModelConfig, files: Files, named_as_ours: bool) -> None:
        self.place, self.config, self._files, self._ours = place, config, files, named_as_ours
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        if config.num_layers > len(files.shapes()):  # a number that somebody wrote, before anything is made of it
            raise WeightsError(f"{place}: says {config.num_layers} layers, and holds {len(files.shapes())} tensors")
        self.groups = [tuple(self._respelled(link) for link in group) for group in groups(config)]
        self._links = {link.ours: link for group in self.groups for link in group}
        self._check()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The weights of the embedding, of each layer, of the final norm and of the output, one group at a time."""
        for group in self.groups:
            yield {link.ours: self.weight(link.ours) for link in group}

    def weight(self, name: str) -> Tensor:
        """One weight of the whole model."""
        link = self._links[name]
        return link.join([self._files.tensor(theirs) for theirs in self._names(link)], self.config)

    def _respelled(self, link: Link) -> Link:
        """Hugging Face's head of GPTNeoX has two names."""
        renamed = link.theirs == ("embed_out.weight",) and "lm_head.weight" in self._files.shapes()
        return Link(link.ours, ("lm_head.weight",), link.join, link.split) if renamed else link

    def _names(self, link: Link) -> tuple[str, ...]:
        return (link.ours,) if self._ours else link.theirs

    def _check(self) -> None:
        shapes = dict(self._files.shapes())
        expected = weight_shapes(self.config, self.vocab_size)
        mistakes: list[str] = []
        for link in self._links.values():
            names = self._names(link)
            missing = [name for name in names if name not in shapes]
            mistakes += [f"{name} is missing" for name in missing]
            if not missing:
                mistakes += _misshapen(link, names, [shapes[name] for name in names], expected[link.ours], self)
        known = {name for link in self._links.values() for name in self._names(link)}
        tied = {"lm_head.weight", "embed_out.weight", "output_layer.weight"} if self.config.tie_embeddings else set()
        strange = [name for name in shapes if name not in known | tied and not _BUFFERS.fullmatch(name)]
        mistakes += [f"{name} has no place in this architecture" for name in strange]
        mistakes += self._rotary_mistakes(shapes)
        if mistakes:
            shown = "\n  ".join(mistakes[:8] + (["..."] if len(mistakes) > 8 else []))
            raise WeightsError(f"{self.place}: {len(mistakes)} tensor(s) do not fit the model:\n  {shown}")

    def _rotary_mistakes(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Saved frequencies tell how many values of a head rotate, which no weight's shape does."""
        turning = int(self.config.head_size * self.config.rotary_fraction) // 2
        name = next((n for n in shapes if n.endswith(INV_FREQ)), None)
        if name is None or shapes[name] == (turning,):
            return []
        return [
            f"{name} has {shapes[name][0]} frequencies; num_attention_heads={self.config.num_attention_heads} and "
            f"rotary_fraction={self.config.rotary_fraction} make {turning}: one of them is not that of the weights"
        ]


def _misshapen(link: Link, names: tuple[str, ...], shapes: list[Shape], expected: Shape, source: Source) -> list[str]:
    if len(names) == 1:
        parts = [expected]
    else:
        whole = torch.empty(expected, device="meta")
        parts = [tuple(part.shape) for part in link.split(whole, source.config)]
    return [
        f"{name} is {list(found)}, config says {list(part)}"
        for name, found, part in zip(names, shapes, parts, strict=True)
        if tuple(found) != tuple(part)
    ]

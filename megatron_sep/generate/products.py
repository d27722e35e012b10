"""Products of a layer that take the same input, computed as one: a step of one token reads their weights in one kernel.

The first of them computes the rows of all and keeps the others theirs, which they take if they are asked with the very
same tensor.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of such products in the layers of transformers."""


@dataclass(eq=False)
class _Whole:
    """What products share: the rows of all, and what was computed last and not taken by all."""

    parts: "list[_Part]"
    weight_NK: Tensor
    bias_N: Tensor | None
    given: tuple[Tensor, tuple[Tensor, ...]] | None = None
    """The input, and what each product makes of it."""

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        """Of each part."""
        return torch.split(linear(x, self.weight_NK, self.bias_N), [part.out_features for part in self.parts], -1)

    def part_ways(self) -> None:
        """Each is a product by itself again."""
        for part in self.parts:
            part.__class__ = nn.Linear  # type: ignore[assignment]
            del part.whole


class _Part(nn.Linear):
    """A product whose weight is a view of that of all: so it is trained, saved and loaded as before.

    Where gradients are wanted it multiplies with its own weight. Once one of the parts is given another weight, or is
    moved to another device or type, all are by themselves again.
    """

    whole: _Whole

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            self.whole.part_ways()
        nn.Linear.__setattr__(self, name, value)

    def _apply(self, *arguments: Any, **options: Any) -> nn.Linear:
        self.whole.part_ways()
        return self._apply(*arguments, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a product by itself: copied parameters are views of nothing."""
        return nn.Linear.__new__, (nn.Linear,), {name: value for name, value in vars(self).items() if name != "whole"}


class _First(_Part):
    def forward(self, x: Tensor) -> Tensor:
        """Its own rows of all that are computed."""
        if torch.is_grad_enabled():
            return super().forward(x)
        parts = self.whole.products(x)
        self.whole.given = x, parts
        return parts[0]


class _Later(_Part):
    def forward(self, x: Tensor) -> Tensor:
        """What the first computed of this very input; of any other its own product."""
        given = self.whole.given  # read once: another thread may set it meanwhile
        if torch.is_grad_enabled() or given is None or given[0] is not x:
            return super().forward(x)
        place = self.whole.parts.index(self)
        if place == len(self.whole.parts) - 1:
            self.whole.given = None
        return given[1][place]


@torch.no_grad()
def merge_products(model: nn.Module) -> None:
    """In place, without more memory: weights become views of a common one.

    Others than plain ``Linear`` stay as they are, as do those that hooks move about and those that do not fit together.
    """
    for module, names in itertools.product(list(model.modules()), TOGETHER):
        parts = [getattr(module, name, None) for name in names]
        if _can_be_merged(parts):
            _merge(parts)


def part_products(model: nn.Module) -> None:
    """What ``merge_products`` made is undone; the weights stay where they are."""
    for whole in {id(m.whole): m.whole for m in model.modules() if isinstance(m, _Part)}.values():
        whole.part_ways()


def _can_be_merged(parts: Sequence[Any]) -> bool:
    if any(type(part) is not nn.Linear or "forward" in vars(part) for part in parts):
        return False
    kinds = {(part.in_features, part.weight.dtype, part.weight.device, part.bias is None) for part in parts}
    return len(kinds) == 1 and parts[0].weight.device.type != "meta"


def _merge(parts: list[Any]) -> None:
    sizes = [part.out_features for part in parts]
    whole = _Whole(parts, torch.cat([part.weight for part in parts]), None)
    _share(parts, "weight", torch.split(whole.weight_NK, sizes))
    if parts[0].bias is not None:
        whole.bias_N = torch.cat([part.bias for part in parts])
        _share(parts, "bias", torch.split(whole.bias_N, sizes))
    for part, kind in zip(parts, (_First, *itertools.repeat(_Later, len(parts) - 1)), strict=True):
        part.whole = whole
        part.__class__ = kind


def _share(parts: Sequence[nn.Linear], name: str, views: Sequence[Tensor]) -> None:
    for part, view in zip(parts, views, strict=True):
        getattr(part, name).data = view

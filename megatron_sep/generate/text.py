"""The token ids of a forward pass, also where an outer model hands embeddings on to its decoder."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_sep.generate.architecture import parameters
from megatron_sep.generate.interface import AttachError

_OTHER_MEDIA = ("pixel_values", "image", "video", "audio", "input_features")
"""How arguments begin that carry something else than text."""
_OUTER: ContextVar[dict[str, Any]] = ContextVar("outer")
"""What was given to the outermost model that this thread is in."""


@dataclass(frozen=True)
class Text:
    """What a decoder is called with."""

    ids_BT: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    planes: Tensor | None
    """Positions [planes, B, T] of a model that has several a token, the same in all planes where it is text."""


def text_of(given: dict[str, Any]) -> Text:
    """Of a decoder's arguments by name. Raises AttachError where no ids are known for them."""
    ids, mask, embeddings = given.get("input_ids"), given.get("attention_mask"), given.get("inputs_embeds")
    outer = _OUTER.get({})
    if ids is None and embeddings is not None and outer.get("input_ids") is not None:
        ids, mask = outer["input_ids"], outer.get("attention_mask")
        if ids.shape != embeddings.shape[:2]:
            raise AttachError(
                f"inputs_embeds of shape {tuple(embeddings.shape)} for input_ids {tuple(ids.shape)}: the model turns "
                "a token into several embeddings, and the cache cannot tell which of them are separators"
            )
    if ids is None or ids.dim() != 2:
        found = "no input_ids" if ids is None else f"input_ids of shape {tuple(ids.shape)}"
        raise AttachError(f"{found}: the cache looks for separators among token ids; pass input_ids, [B, T]")
    positions = given.get("position_ids")
    planes = positions if positions is not None and positions.dim() == 3 else None
    if outer and outer.get("position_ids") is None and planes is None:
        positions = None  # counted by an outer model, which does not look at padding
    return Text(ids, mask, positions if planes is None else planes[0], planes)


def note_text(outer: nn.Module) -> list[Any]:
    """Hooks on a model around a decoder: while it runs, its ids are known. Handles to remove them."""
    note = _Note(parameters(outer))
    return [
        outer.register_forward_pre_hook(note.begin, with_kwargs=True),
        outer.register_forward_hook(note.end, always_call=True),
    ]


@dataclass(frozen=True)
class _Note:
    parameters: list[str]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises AttachError for pictures and sound."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        other = [name for name, value in given.items() if name.startswith(_OTHER_MEDIA) and isinstance(value, Tensor)]
        if other:
            raise AttachError(
                f"{type(module).__name__}: {', '.join(other)}: the cache reads text alone; call detach() for the rest"
            )
        if given.get("input_ids") is not None:
            _OUTER.set(given)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """No ids are known any more."""
        _OUTER.set({})

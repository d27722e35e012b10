"""What a call says of its columns beside their ids: padding, documents that are packed into a row, positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sep.generate.interface import AttachError

_HIDDEN = -1e4
"""What a mask adds, at most, to a score that is not to count."""


@dataclass(frozen=True)
class Layout:
    """Of new tokens [B, T]."""

    real_BT: Tensor | None = None
    """bool, False at padding; None: there is none."""
    starts_BT: Tensor | None = None
    """bool, True where a document begins behind another one; None: nowhere."""

    @property
    def plain(self) -> bool:
        """Is every column a token that goes on with its row's document?"""
        return self.real_BT is None and self.starts_BT is None


def of_mask(attention_mask: Tensor | None, batch: int, tokens: int, past: int) -> Layout:
    """What an attention mask says of ``tokens`` new columns behind ``past`` ones.

    It is 0 at padding and 1 elsewhere, [B, T] or [B, past + T]; or, for tokens without a past, [B, 1, T, T] with
    causal attention within packed documents, as bool or as numbers to add. Raises AttachError for any other.
    """
    if attention_mask is None:
        return Layout()
    shape = tuple(attention_mask.shape)
    if shape in {(batch, tokens), (batch, past + tokens)}:
        return _of_flags(attention_mask[:, -tokens:])
    if shape in {(batch, 1, tokens, tokens), (1, 1, tokens, tokens)} and not past:
        return _of_square(attention_mask[:, 0].expand(batch, -1, -1))
    raise AttachError(
        f"attention_mask of shape {shape} for {batch} texts of {tokens} new tokens behind {past}: what a token sees is "
        f"the policy's to say; pass 0 at padding and 1 elsewhere, ({batch}, {past + tokens}), or None"
    )


def _of_flags(flags_BT: Tensor) -> Layout:
    real_BT = flags_BT == 1
    if bool(real_BT.all()):
        return Layout()
    if not bool((real_BT | (flags_BT == 0)).all()):
        raise AttachError(
            f"attention_mask with values from {flags_BT.min().item()} to {flags_BT.max().item()}: it is 0 at padding "
            "and 1 elsewhere; tell packed documents by position_ids that begin at 0 again"
        )
    return Layout(real_BT)


def _of_square(mask_BTT: Tensor) -> Layout:
    """Of a mask that separates packed documents and hides padding, and does nothing else."""
    hidden_BTT = ~mask_BTT if mask_BTT.dtype == torch.bool else mask_BTT <= _HIDDEN
    visible_BTT = mask_BTT if mask_BTT.dtype == torch.bool else mask_BTT == 0
    real_BT, first_BT = visible_BTT.diagonal(dim1=1, dim2=2), visible_BTT.int().argmax(-1)
    place = torch.arange(mask_BTT.shape[1], device=mask_BTT.device)
    document_BTT = (first_BT[:, :, None] <= place) & (place <= place[:, None]) & real_BT[:, None]
    as_expected_BTT = (visible_BTT == document_BTT) | ~real_BT[:, :, None]
    if not bool((as_expected_BTT & (hidden_BTT | visible_BTT)).all()):
        raise AttachError(
            f"attention_mask of shape {tuple(mask_BTT[:, None].shape)}: is not causal attention within documents; what "
            "a token sees is the policy's to say; pass 0 at padding and 1 elsewhere, or None"
        )
    begun_BT = real_BT & (real_BT.cumsum(1) > 1) & (first_BT == place)
    return Layout(None if bool(real_BT.all()) else real_BT, begun_BT if bool(begun_BT.any()) else None)


def restarts(position_BT: Tensor, running_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Where positions that were given begin at 0 again behind a document: bool [B, T].

    ``running`` are those that would follow the tokens so far. Raises AttachError for positions that do neither.
    """
    real_BT = torch.ones_like(running_BT, dtype=torch.bool) if real_BT is None else real_BT
    shape = tuple(position_BT.shape)
    if position_BT.dim() != 2 or shape[1] != running_BT.shape[1] or shape[0] not in (1, len(running_BT)):
        raise AttachError(
            f"position_ids of shape {shape}: for tokens {tuple(running_BT.shape)} pass one a token, or none"
        )
    starts_BT = real_BT & (position_BT == 0) & (running_BT > 0)
    since_BT = torch.where(starts_BT, running_BT, 0).cummax(1).values
    wrong_BT = real_BT & (position_BT != running_BT - since_BT)
    if bool(wrong_BT.any()) or (shape[1] == 1 and bool(starts_BT.any())):
        row, column = (wrong_BT | starts_BT).nonzero()[0].tolist()
        raise AttachError(
            f"position_ids: {position_BT.expand_as(running_BT)[row, column].item()} for token {column} of row {row}, "
            f"which stands at {running_BT[row, column].item()}: positions go on by one, or begin at 0 with each packed "
            "document; pass none, and the cache counts them"
        )
    return starts_BT


def whole_at_end(real_BT: Tensor) -> int:
    """How many of the last columns are padding in no row."""
    return int(real_BT.all(0).flip(0).int().cumprod(0).sum())

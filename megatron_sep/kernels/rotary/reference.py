"""Split and rotation written out, in fp32 or wider: the truth that the other rows are held to."""

import torch
from torch import Tensor


def split_rotated(
    qkv_SBX: Tensor, bias: Tensor | None, angle: Tensor | None, groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``rotary.SplitRotated``."""
    wide = qkv_SBX.to(torch.promote_types(qkv_SBX.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
    per_group = wide.view(*wide.shape[:2], groups, -1, size)
    q, k, v = torch.split(per_group, [per_group.shape[3] - 2, 1, 1], dim=3)
    rotated = (x.flatten(2, 3) if angle is None else _rotated(x.flatten(2, 3), angle) for x in (q, k))
    q, k, v = (x.to(qkv_SBX.dtype) for x in (*rotated, v.squeeze(3)))
    return q, k, v


def _rotated(x_SBHD: Tensor, angle: Tensor) -> Tensor:
    half = angle.shape[2]
    cos, sin = angle.cos().unsqueeze(2), angle.sin().unsqueeze(2)
    x, y, rest = torch.split(x_SBHD, [half, half, x_SBHD.shape[3] - 2 * half], dim=3)
    return torch.cat((x * cos - y * sin, y * cos + x * sin, rest), dim=3)

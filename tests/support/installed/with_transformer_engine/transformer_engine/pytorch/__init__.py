import torch

from transformer_engine import anything_in

__getattr__ = anything_in(__name__)


class LayerNorm(torch.nn.LayerNorm):
    def __init__(self, normalized_shape: int, eps: float = 1e-5, params_dtype: torch.dtype | None = None) -> None:
        super().__init__(normalized_shape, eps, dtype=params_dtype)


class RMSNorm(torch.nn.RMSNorm):
    def __init__(self, normalized_shape: int, eps: float = 1e-5, params_dtype: torch.dtype | None = None) -> None:
        super().__init__(normalized_shape, eps, dtype=params_dtype)

import torch


class FusedLayerNorm(torch.nn.LayerNorm):
    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        assert not memory_efficient
        super().__init__(normalized_shape, eps, elementwise_affine)


class FusedRMSNorm(torch.nn.RMSNorm):
    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        assert not memory_efficient
        super().__init__(normalized_shape, eps, elementwise_affine)

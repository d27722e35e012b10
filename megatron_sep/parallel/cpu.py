"""Lets megatron-core run where torch has no CUDA; with adam.py and seeds.py the only place that patches.

megatron-core, 0.16.1 as 0.19, names the device "cuda" in factory calls, asks tensors for their CUDA type name, waits
for the device and keeps its random states on the GPU; 0.19 also asks for the stream that gradients are reduced behind.
`install` answers all of it from the CPU. It changes the process for good and does nothing where CUDA is present, so
call it before the first model is built and nowhere else.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
_installed: list["CudaMeansCpu"] = []


class CudaMeansCpu(TorchFunctionMode):
    """Turns device="cuda" into the CPU, `.cuda()` into the tensor itself, and `.type()` into the CUDA type's name."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        return func(*args, **kwargs)


class CpuRngTracker:
    """megatron-core's CudaRNGStatesTracker on the CPU generator: named random states that `fork` switches between."""

    is_inference_rng_tracker = False
    use_cudagraphable_rng = False

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self.states_: dict[str, Tensor] = {}

    def get_states(self) -> dict[str, Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        outside = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def install() -> None:
    """Patch torch and megatron-core for the CPU, once; a no-op where CUDA is available."""
    if torch.cuda.is_available() or _installed:
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # noqa: ARG005
    _without_streams()
    mode = CudaMeansCpu()
    mode.__enter__()  # type: ignore[no-untyped-call]
    _installed.append(mode)

    from megatron.core.tensor_parallel import random

    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def _without_streams() -> None:
    """For 0.19, which keeps the current stream and uses it on a GPU alone."""
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]  # noqa: ARG005

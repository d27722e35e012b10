"""One token after another through a model with a SepCache; on CUDA a step is one replayed CUDA graph."""

from typing import Any

import torch
from torch import Tensor

from megatron_sep.generate.architecture import cache_name
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.dependent import chosen, launching
from megatron_sep.generate.products import merge_products
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import BackendError
from megatron_sep.kernels.why_not import DEPENDENT_OPTION, fused_decode

_WARM_UP = 2
"""Steps that run as they are before one is captured: what they compile cannot be compiled while capturing."""

OPTIONS = {
    "coordinate_descent_tuning": True,  # the product of a matrix and one token becomes a reduction at memory's speed
    "realize_acc_reads_threshold": 1,  # an activation is computed once, not for each row of the matrix it goes into
}
"""Of Inductor, for steps of one token."""


class Decoder:
    """Steps of a model that ``attach`` was called on. Keep nothing of a step's logits: the next one overwrites them.

    ``graph``: is a step a CUDA graph; None: where its kernels allow. ``dependent``: is the attention's kernel launched
    while the one before it still ends; None: as ``dependent.py`` says. Raises BackendError where it cannot.
    """

    def __init__(self, model: Any, cache: SepCache, graph: bool | None = None, dependent: bool | None = None) -> None:
        self.model, self.cache = model, cache
        self._given = {cache_name(model): cache}
        self._wanted = _fused(model) if graph is None else graph
        self._dependent = chosen(model.device, dependent if self._wanted else bool(dependent))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._ids_B1: Tensor | None = None
        self._logits_BV: Tensor | None = None

    @torch.no_grad()
    def read(self, ids_BT: Tensor, attention_mask: Tensor | None = None, chunk: int = 2048) -> Tensor:
        """Take in a prompt, ``chunk`` tokens at a time: the logits after its last column, [B, V]."""
        for begin in range(0, ids_BT.shape[1], chunk):
            columns = slice(begin, begin + chunk)
            mask = None if attention_mask is None else attention_mask[:, columns]
            output = self.model(ids_BT[:, columns], attention_mask=mask, logits_to_keep=1, **self._given)
        logits: Tensor = output.logits[:, -1]
        return logits

    @torch.no_grad()
    def step(self, ids_B1: Tensor) -> Tensor:
        """Take in one token of each text: logits [B, V] of the next."""
        if not self._wanted:
            return self._run(ids_B1)
        if self.cache.room():
            self.forget()
        if self._graph is None:
            self._steps += 1
            if self._steps <= _WARM_UP:
                return self._warm_up(ids_B1)
            self._capture(ids_B1)
        else:
            self.cache.replayed()
        assert self._graph is not None
        assert self._ids_B1 is not None
        assert self._logits_BV is not None
        self._ids_B1.copy_(ids_B1)
        self._graph.replay()
        return self._logits_BV

    def forget(self) -> None:
        """The stores of the cache were replaced: the next step is captured anew."""
        self._graph, self._steps = None, min(self._steps, _WARM_UP - 1)

    def _run(self, ids_B1: Tensor) -> Tensor:
        with launching(self._dependent):
            logits: Tensor = self.model(ids_B1, **self._given).logits[:, -1]
        return logits

    def _warm_up(self, ids_B1: Tensor) -> Tensor:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            logits = self._run(ids_B1)
        torch.cuda.current_stream().wait_stream(stream)
        return logits

    def _capture(self, ids_B1: Tensor) -> None:
        self._ids_B1 = ids_B1.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits_BV = self._run(self._ids_B1)


def _fused(model: Any) -> bool:
    """Are its steps computed by kernels alone? The plain implementation asks the host, which no graph repeats."""
    if model.device.type != "cuda":
        return False
    text = model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return fused_decode(Call.on(model.device, model.dtype, head_size=size)) is None


def compile_layers(
    model: Any, backend: str = "inductor", dependent: bool | None = None, merged: bool = True
) -> None:  # fmt: skip
    """Fuse what stands between the attentions of a step, the last norm and the output layer; attention stays as it is.

    All layers share one compilation: their numbers are not part of it. ``dependent``: are Inductor's kernels launched
    while the one before them still ends; None: as ``dependent.py`` says. Raises BackendError where they cannot.
    ``merged``: products of the same input become one (``products.py``), so call this when the model is where it stays.
    """
    if dependent and backend != "inductor":
        raise BackendError(f"dependent=True, backend={backend!r}: is of Inductor's kernels alone; pass dependent=None")
    if merged:
        merge_products(model)
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    options = _options(chosen(model.device, dependent)) if backend == "inductor" else None
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layers = [module for module in model.modules() if type(module) is type(stack[0])]
    for module in (*layers, *_beside(model, stack), model.get_output_embeddings()):
        module.compile(backend=backend, dynamic=False, options=options)


def _options(dependent: bool) -> dict[str, Any]:
    """Of Inductor. A version without the name makes no dependent launches, and is told nothing of them."""
    return OPTIONS | ({DEPENDENT_OPTION: True} if dependent else {})


def _beside(model: Any, stack: torch.nn.ModuleList) -> list[torch.nn.Module]:
    """The norms that stand next to the layers."""
    beside = [list(module.children()) for module in model.modules()]
    return [
        module
        for module in next(children for children in beside if any(child is stack for child in children))
        if (weights := list(module.parameters())) and all(weight.dim() == 1 for weight in weights)
    ]

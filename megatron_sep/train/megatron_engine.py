"""Forward, backward and step over every parallel rank: megatron-core's schedules, DDP and distributed optimizer."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from megatron_sep.config.schema import LossScaleConfig, OptimizerConfig
from megatron_sep.kernels.adamw import AdamW
from megatron_sep.kernels.operation import BackendError
from megatron_sep.model.decoder import Decoder
from megatron_sep.parallel.adam import adam_of
from megatron_sep.parallel.core_versions import gradients_of_norm
from megatron_sep.parallel.groups import ParallelError
from megatron_sep.parallel.topology import Topology
from megatron_sep.train.beside_backward import Accumulate, begin_reductions
from megatron_sep.train.engine import Engine, OptimizerSlot, StepResult
from megatron_sep.train.megatron_files import MegatronWriting, check_safe
from megatron_sep.train.microbatch import Microbatch
from megatron_sep.train.own_work import OwnWork
from megatron_sep.train.recorded import Recorder
from megatron_sep.weights.sealed import CheckpointError

Tree = dict[str, Any]
_CLIP_EPS = 1e-6
"""As in torch's ``clip_grads_with_norm_``."""
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
_EXTRA_STATE = "._extra_state"


class MegatronEngine(Engine):
    """Trains a Decoder with the optimizer of its operations; every rank of the job holds one, or one a chunk."""

    name = "megatron"
    reads = ("deepspeed",)
    splits_optimizer = True
    """Do the data-parallel ranks share the optimizer's state (ZeRO-1)?"""

    def __init__(
        self,
        model: Decoder,
        topology: Topology,
        optimizer: OptimizerConfig,
        *,
        precision: str,
        loss_scale: LossScaleConfig,
        sequence_length: int,
        micro_batch_size: int,
        cuda_graphs: str = "auto",
        zero_stage: int = 1,
        further_chunks: Sequence[Decoder] = (),
    ) -> None:
        """``further_chunks``: those after the first, of an interleaved pipeline."""
        if zero_stage != 1:
            raise ParallelError(
                f"parallel.zero_stage={zero_stage}: this engine splits the optimizer's state alone; set 1"
            )
        self._topology, self._config = topology, optimizer
        self._sequence_length, self._micro_batch_size = sequence_length, micro_batch_size
        core = model.config
        self._weights = [model, *further_chunks]
        self._modules = self._weights if precision == "fp32" else [Float16Module(core, c) for c in self._weights]
        self._overlaps = topology.data.size * topology.context.size > 1
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=self.splits_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self._overlaps,
            average_in_collective=topology.device.type == "cuda",  # gloo only sums
        )
        self._models = [DistributedDataParallel(core, ddp, module) for module in self._modules]
        if self._overlaps:
            core.no_sync_func = [model.no_sync for model in self._models] if further_chunks else self._models[0].no_sync
        self._adamw: AdamW = model.operations.adamw
        self._optimizer = self._make_optimizer(precision, loss_scale)
        self._own_work = OwnWork(topology.device)
        core.finalize_model_grads_func = self._finalize
        core.grad_scale_func = self._optimizer.scale_loss
        self._run = get_forward_backward_func()
        self._recorder = _recorder(cuda_graphs, core, topology)

    def _make_optimizer(self, precision: str, loss_scale: LossScaleConfig) -> MegatronOptimizer:
        optimizer = _optimizer(self._models, self._adamw, self._config, precision, loss_scale)
        self._rounded = _rounded(optimizer)
        return optimizer

    def forward_backward(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """Gradients of the mean loss of ``count`` micro-batches; returns that loss over all ranks, an fp32 scalar."""
        self._own_work.begin()
        for model in self._models:
            model.train()
        if self._recorder is None:
            for model in self._models:
                model.zero_grad_buffer()
            self._optimizer.zero_grad()
            return self._schedule(microbatches, count, forward_only=False)
        losses: list[Tensor] = []
        for batch in microbatches:
            first, last = not losses, len(losses) == count - 1
            learn = partial(self._learn, count=count, first=first, last=last)
            losses.append(self._recorder.run("training", learn, batch, count, first, last))
        return self._mean(losses)

    def _finalize(self, *arguments: Any, **options: Any) -> None:
        """Where megatron-core reduces the gradients over the ranks."""
        self._own_work.end()
        finalize_model_grads(*arguments, **options)

    def own_seconds(self) -> float:
        """Mean seconds of a step's passes since the last call, up to where the gradients are reduced."""
        return self._own_work.seconds()

    @property
    def decoders(self) -> Sequence[Decoder]:
        """One, or one a chunk."""
        return self._weights

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """The mean loss of ``count`` micro-batches over all ranks, an fp32 scalar."""
        if self._recorder is None:
            return self.look(microbatches, count)
        for model in self._models:
            model.eval()
        return self._mean([self._recorder.run("validation", self._loss, batch) for batch in microbatches])

    @torch.no_grad()
    def look(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """As ``evaluate``, with nothing replayed."""
        for model in self._models:
            model.eval()
        return self._schedule(microbatches, count, forward_only=True)

    def _loss(self, batch: Microbatch) -> Tensor:
        """The mean loss of a micro-batch, an fp32 scalar."""
        (model,) = self._models
        losses, mean = _forward(1, iter([batch]), model)
        loss: Tensor = mean(losses)[0]
        return loss

    def _learn(self, batch: Microbatch, count: int, first: bool, last: bool) -> Tensor:
        """What megatron-core's schedule does for one of ``count`` micro-batches on a single stage.

        The first gradients replace what is in their fp32 sums; the last ones are reduced over the ranks.
        """
        (model,) = self._models
        loss = self._loss(batch)
        scaled = self._optimizer.scale_loss(loss / count)
        accumulate: Accumulate = torch._foreach_copy_ if first else torch._foreach_add_
        if last and self._overlaps:
            begin_reductions(model, scaled, accumulate)
        else:
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(scaled, weights, materialize_grads=True)
            accumulate([weight.main_grad for weight in weights], list(gradients))
        if last and self._topology.process.size > 1:
            self._finalize(self._models)
        return loss.detach()

    def loss_scale(self) -> float:
        """Factor on the loss before the backward pass; 1 but for fp16."""
        return float(self._optimizer.get_loss_scale())

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Clip and apply the gradients, unless one of them is not finite on any rank."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        if self._optimizer.prepare_grads():  # fp16: an overflow, and the loss scale was lowered
            return StepResult(torch.full((), math.inf, device=self._topology.device))
        norm = self._grad_norm()
        if self._adamw.skips_by_itself:
            self._step_on_device(norm)
        elif math.isfinite(float(norm)):
            if self._config.clip_grad:
                clip_grads_with_norm_(self._optimizer.get_parameters(), self._config.clip_grad, norm)
            self._apply()
        return StepResult(norm)

    def _step_on_device(self, norm: Tensor) -> None:
        """Clipped, and nothing changes where the norm is not finite; the host does not wait to learn of it."""
        adamw = self._optimizer.optimizer
        adamw.found_inf = norm.isfinite().logical_not().float()
        clip = self._config.clip_grad
        adamw.grad_scale = ((norm + _CLIP_EPS) / clip).clamp(min=1.0) if clip else None
        self._apply()

    def _apply(self) -> None:
        """megatron-core's step, but that the 16-bit weights are rounded from their masters all at once."""
        self._optimizer.optimizer.step()
        if self._rounded:
            torch._foreach_copy_(list(self._rounded.values()), list(self._rounded))
        for model in self._models:
            model.start_param_sync()

    def _grad_norm(self) -> Tensor:
        """Of all gradients of the job, fp32, on the device.

        megatron-core's own, where it finds neither Transformer Engine nor apex, waits for the device once for each
        parameter.
        """
        gradients = gradients_of_norm(self._optimizer)
        square = get_total_norm(gradients).to(self._topology.device).square()
        dist.all_reduce(square, group=self._optimizer.get_grad_stats_parallel_group())
        return square.sqrt()

    def optimizer_slots(self) -> Mapping[nn.Parameter, OptimizerSlot]:
        """As megatron-core keeps them. Raises CheckpointError where steps are counted elsewhere."""
        if self._adamw.library != "torch":
            raise CheckpointError(
                f"checkpoint.init_optimizer=true: {self._adamw.library}'s AdamW does not count the steps of each "
                "weight; take torch's, or set it to false to start with a new optimizer"
            )
        found = {}
        for parameter in self._optimizer.model_param_group_index_map:
            own = self._optimizer._get_model_param_range_map(parameter)["param"]
            tensors = self._optimizer._get_main_param_and_optimizer_states(parameter)
            found[parameter] = OptimizerSlot(slice(own.start, own.end), tensors)
        return found

    def begin_save(self, folder: Path) -> MegatronWriting:
        """In torch's distributed format, through megatron-core, from a copy on the host."""
        return MegatronWriting(self._state(), folder, self._topology.process.rank)

    def load(self, folder: Path) -> None:
        """On this or another number of ranks, in this or another layout. No code of the files runs."""
        check_safe(folder)
        self._take_over(dist_checkpointing.load(self._state(loading=True), str(folder)))

    def _state(self, loading: bool = False) -> Tree:
        """Weights, optimizer and loss scale as megatron-core's sharded state dict, for saving or as a frame to load."""
        weights = self._saved_weights()
        with adam_of(self._adamw.library, self._adamw.kind):
            optimizer = self._optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_SHARDING)
        return {"model": weights, "optimizer": optimizer}

    def _take_over(self, state: Tree) -> None:
        self._load_weights(state["model"])
        settings = dict(state["optimizer"])
        moments = settings.pop("param_state")
        rates = {key: self._optimizer.param_groups[0].get(key) for key in ("max_lr", "min_lr")}
        for group in settings["optimizer"]["param_groups"]:  # megatron-core knows groups by rates, which may change
            group.update({key: rate for key, rate in rates.items() if key in group})
        with adam_of(self._adamw.library, self._adamw.kind):
            self._optimizer.load_state_dict(settings)
        for group in self._optimizer.param_groups:  # now those of the run that wrote them
            group.update(self._adamw.settings)
        # megatron-core gives every parameter the same step tensor, which torch's AdamW would advance once for each,
        # and then looks for it among the moments
        per_parameter = self._optimizer.optimizer.state
        steps = {
            parameter: values.pop("step").clone() for parameter, values in per_parameter.items() if "step" in values
        }
        self._optimizer.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            per_parameter[parameter]["step"] = step

    def _saved_weights(self) -> Tree:
        """As megatron-core saves them; of several chunks, each under its own."""
        found = [_tensors_alone(module.sharded_state_dict()) for module in self._modules]
        return found[0] if len(found) == 1 else {f"chunk{i}": chunk for i, chunk in enumerate(found)}

    def _load_weights(self, weights: Tree) -> None:
        for i, model in enumerate(self._weights):
            chunk = weights if len(self._weights) == 1 else weights[f"chunk{i}"]
            missing, unexpected = model.load_state_dict(chunk, strict=False)
            assert not unexpected
            assert all(name.endswith(_EXTRA_STATE) for name in missing)

    def _schedule(self, microbatches: Iterable[Microbatch], count: int, forward_only: bool) -> Tensor:
        copies = tee(microbatches, len(self._models))  # each chunk runs through all of them
        losses = self._run(
            forward_step_func=partial(_forward, self._topology.context.size),
            data_iterator=list(copies) if len(copies) > 1 else copies[0],
            model=self._models,
            num_microbatches=count,
            seq_length=self._sequence_length,
            micro_batch_size=self._micro_batch_size,
            forward_only=forward_only,
        )
        return self._mean([loss["loss"] for loss in losses])

    def _mean(self, found: Sequence[Tensor]) -> Tensor:
        """Over all ranks, of the losses that a rank of the last pipeline stage has."""
        mean: Tensor = torch.stack(list(found)).mean() if found else torch.zeros((), device=self._topology.device)
        return self._topology.mean_over_last_stages(mean)


def _rounded(optimizer: MegatronOptimizer) -> dict[Tensor, Tensor]:
    """Of each fp32 master of this rank the 16-bit weight that computes; none in fp32."""
    masters, weights = (
        [shard for group in groups for shard in group]
        for groups in (optimizer.shard_fp32_from_float16_groups, optimizer.shard_float16_groups)
    )
    return dict(zip(masters, weights, strict=True))


def _recorder(wanted: str, core: TransformerConfig, topology: Topology) -> Recorder | None:
    """None where passes run as they are; "auto" takes CUDA graphs where nothing speaks against them. Raises
    BackendError."""
    if wanted == "off":
        return None
    reason = why_not_recorded(core, topology)
    if reason is None:
        return Recorder(topology.say)
    if wanted == "on":
        raise BackendError(f"train.cuda_graphs=on: {reason}; set train.cuda_graphs=auto")
    if topology.device.type == "cuda":
        topology.say(f"no CUDA graphs: {reason}")
    return None


def why_not_recorded(core: TransformerConfig, topology: Topology) -> str | None:
    """What in a pass a CUDA graph would not repeat; None: nothing."""
    if topology.device.type != "cuda":
        return "there is no CUDA device"
    if topology.pipeline.size > 1:
        return "the stages of a pipeline run by a schedule of the host"
    if topology.context.size > 1:
        return "how many keys context parallelism sends depends on the text"
    if core.hidden_dropout or core.attention_dropout:
        return "dropout draws anew in each pass"
    if core.fp16:
        return "the loss scale of fp16 changes"
    return None


def _tensors_alone(state: Tree) -> Tree:
    """Without Transformer Engine's extra states, which are empty here and which torch would unpickle to read."""
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def _forward(
    context_ranks: int, microbatches: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    batch = next(microbatches)
    return model(batch.ids_BT, batch.position_BT, batch.plans, labels=batch.labels_BT), partial(
        _mean_loss, context_ranks, batch.weight_BT
    )


def _mean_loss(context_ranks: int, weight_BT: Tensor | None, loss_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Of this process's tokens: twice, since the schedule changes the first in place.

    It divides it by the micro-batches, and multiplies it by the context-parallel ranks, over which DDP then takes the
    mean of the gradients as over data-parallel ones; that factor is taken out here.
    """
    loss = (loss_BT.float() if weight_BT is None else loss_BT.float() * weight_BT).mean()
    return loss / context_ranks, {"loss": loss.detach().clone()}


def _optimizer(
    models: list[DistributedDataParallel],
    adamw: AdamW,
    config: OptimizerConfig,
    precision: str,
    scale: LossScaleConfig,
) -> MegatronOptimizer:
    """AdamW on fp32 master weights, its state as before the first step: a checkpoint's content is always the same."""
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        use_distributed_optimizer=True,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        params_dtype=next(models[0].parameters()).dtype,
        initial_loss_scale=scale.initial,
        min_loss_scale=scale.minimum,
        loss_scale_window=scale.growth_interval,
        hysteresis=scale.hysteresis,
    )
    with adam_of(adamw.library, adamw.kind):
        optimizer = get_megatron_optimizer(core, models)
    (optimizer,) = getattr(optimizer, "chained_optimizers", [optimizer])
    for group in optimizer.param_groups:
        group.update(adamw.settings)
        for parameter in group["params"]:
            optimizer.optimizer.state[parameter].update(adamw.start(parameter))
    return optimizer

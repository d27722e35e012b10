"""`plan`: what a run will need and take, from its configuration alone, on a machine without torch or GPU."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sep.config import RunConfig, Sketch
from megatron_sep.config.gpus import Gpu, find_gpu
from megatron_sep.config.layout import job_mistakes
from megatron_sep.config.needs import Needs
from megatron_sep.config.size import ModelSize, padded_vocab_size
from megatron_sep.config.speeds import Speeds, speeds_of
from megatron_sep.config.step_time import StepTime
from megatron_sep.config.visible import all_pairs, kept_tokens, model_pairs, num_full_layers
from megatron_sep.errors import UserError
from megatron_sep.report.plan_layouts import SPARE, choices, fastest

_GB = 1e9


class PlanError(UserError):
    """A run that cannot be planned yet."""


@dataclass(frozen=True)
class Machines:
    """What a run is planned for."""

    gpus: int
    kind: str
    """A name of ``config.gpus``."""
    price: float | None
    """Of a GPU for an hour, in any currency."""
    separator_share: float
    """Of the tokens."""

    @property
    def gpu(self) -> Gpu:
        """Raises GpuError."""
        return find_gpu(self.kind)

    @property
    def speeds(self) -> Speeds:
        """Raises GpuError."""
        return speeds_of(self.kind)


def plan(sketch: Sketch, machines: Machines) -> Iterator[str]:
    """One line a finding; those that stand in the run's way begin with `!`. Raises PlanError, GpuError."""
    config, gpu = sketch.config, machines.gpu
    _refuse_what_is_unknown(sketch, machines)
    vocab_size = _vocab_size(sketch)
    needs = Needs(config, vocab_size, machines.gpus)
    size = ModelSize(config.model, vocab_size)
    outside = size.parameters - size.embedding_parameters
    yield f"{size.parameters:,} parameters, {outside:,} without the embeddings; vocabulary {vocab_size:,}"
    yield f"{machines.gpus} x {gpu.name}, speeds {machines.speeds.source}"
    mistakes = job_mistakes(config.parallel, config.train, machines.gpus)
    if mistakes:
        yield from (f"! {mistake}" for mistake in mistakes)
    else:
        yield from _batch(needs)
        yield from _memory(needs, gpu)
    yield from _operations(size, config, machines.separator_share)
    if not mistakes:
        yield from _time(needs, machines)
    yield from _layouts(needs, machines)
    yield from _cache(config, machines.separator_share)
    yield from _disk(needs)


def _refuse_what_is_unknown(sketch: Sketch, machines: Machines) -> None:
    """What would make every number below wrong."""
    unknown = [place for place in sketch.missing if place.startswith("model.")]
    if unknown:
        raise PlanError(f"{', '.join(unknown)}: a plan needs it; set it")
    for name, wrong in (
        (f"--gpus {machines.gpus}", machines.gpus < 1),
        (f"--separator-share {machines.separator_share:g}", not 0 <= machines.separator_share <= 1),
    ):
        if wrong:
            raise PlanError(
                f"{name}: is no number of GPUs" if "gpus" in name else f"{name}: is no share between 0 and 1"
            )


def _vocab_size(sketch: Sketch) -> int:
    model = sketch.config.model
    if model.vocab_size is not None:
        return model.vocab_size
    from megatron_sep.data.tokenizer import load_tokenizer

    path = sketch.config.tokenizer.path
    if "tokenizer.path" in sketch.missing or not path.exists():
        raise PlanError(
            f"the vocabulary is not known: tokenizer.path={path} is not there; set model.vocab_size (50304 for Pythia)"
        )
    return padded_vocab_size(model, load_tokenizer(path, sketch.config.tokenizer.eod).vocab_size)


def _batch(needs: Needs) -> Iterator[str]:
    train, parallel, length = needs.config.train, needs.config.parallel, needs.config.model.sequence_length
    data = needs.data_ranks // parallel.context
    axes = {"data": data, "tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    shown = " x ".join(f"{axis} {ranks}" for axis, ranks in axes.items() if ranks > 1 or axis == "data")
    step = train.global_batch_size * length
    yield (
        f"layout {shown}: {needs.microbatches} micro-batch(es) of {train.micro_batch_size} x {length} tokens a process "
        f"and step; {step:,} tokens a step, {step * train.steps:,} in {train.steps:,} steps"
    )


def _memory(needs: Needs, gpu: Gpu) -> Iterator[str]:
    found = needs.activations
    kinds = {
        "weights": needs.weight_bytes,
        "gradients": needs.gradient_bytes,
        "optimizer": needs.optimizer_bytes,
        "activations": found.kept,
        "logits": found.logits,
        "plans": found.plans,
        "communication": found.communication,
    }
    yield f"memory of the fullest GPU: {_gb(needs.device_bytes)} of {_gb(gpu.memory)}"
    yield f"  {', '.join(f'{kind} {_gb(size)}' for kind, size in kinds.items())}"
    others = {
        str(recompute).lower(): _with_recompute(needs, recompute).activations.kept
        for recompute in (False, "selective", True)
    }
    yield f"  activations by train.recompute: {', '.join(f'{name} {_gb(kept)}' for name, kept in others.items())}"
    if needs.device_bytes > SPARE * gpu.memory:
        yield f"! does not fit: {SPARE:.0%} of a GPU can be filled; a layout that fits stands below, if there is one"


def _with_recompute(needs: Needs, recompute: bool | str) -> Needs:
    train = needs.config.train.model_copy(update={"recompute": recompute})
    return Needs(needs.config.model_copy(update={"train": train}), needs.vocab_size, needs.ranks)


def _operations(size: ModelSize, config: RunConfig, separator_share: float) -> Iterator[str]:
    layers, length, rows = config.model.num_layers, config.model.sequence_length, config.train.global_batch_size
    visible = model_pairs(config.attention, layers, length, separator_share)
    pairs = {"dense": layers * length**2, "causal": layers * all_pairs(length), "visible": visible}
    shown = ", ".join(
        f"{name} {size.training_flops(rows * length, rows * count) / 1e15:.3g}" for name, count in pairs.items()
    )
    yield f"PFLOP a step, counting pairs of queries and keys as: {shown}"
    note = f", if {separator_share:.0%} of the tokens are separators" if _has_separators(config) else ""
    documents = ", and a sequence is one document" if config.attention.document_boundaries else ""
    yield f"  visible: {visible / pairs['causal']:.1%} of the causal pairs{note}{documents}"


def _has_separators(config: RunConfig) -> bool:
    attention = config.attention
    return attention.window is not None and bool(attention.separators or attention.separator_ids)


def _time(needs: Needs, machines: Machines) -> Iterator[str]:
    config = needs.config
    if config.train.precision == "fp32":
        yield "time: not known; the speeds are those of 16 bits, and train.precision is fp32"
        return
    time = StepTime(needs, machines.gpu, machines.speeds, machines.separator_share)
    seconds = time.seconds
    tokens = config.train.global_batch_size * config.model.sequence_length / seconds
    pairs = model_pairs(
        config.attention, config.model.num_layers, config.model.sequence_length, machines.separator_share
    )
    rows = config.train.global_batch_size
    size = ModelSize(config.model, needs.vocab_size)
    flops = size.training_flops(rows * config.model.sequence_length, rows * pairs)
    mfu = flops / seconds / machines.gpu.peak / machines.gpus
    yield f"step: {seconds * 1e3:,.1f} ms, {tokens:,.0f} tokens/s, {mfu:.1%} of the peak by visible pairs"
    yield f"  {', '.join(f'{part} {took * 1e3:,.1f}' for part, took in time.parts.items())} ms"
    hours = (config.train.steps - config.checkpoint.init_step) * seconds / 3600
    cost = (
        ""
        if machines.price is None
        else f"; at {machines.price:g} an hour {hours * machines.gpus * machines.price:,.0f}"
    )
    yield f"run: {_hours(hours)} without validation and saves, {hours * machines.gpus:,.1f} GPU-hours{cost}"


def _layouts(needs: Needs, machines: Machines) -> Iterator[str]:
    if needs.config.train.precision == "fp32":
        return
    found = choices(needs, machines.gpu, machines.speeds, machines.separator_share)
    yield f"layouts of {machines.gpus} GPU(s), each with its fastest micro-batch and recompute:"
    yield from (f"  {choice}" for choice in found)
    best = fastest(found)
    if best:
        yield f"suggested: {best.settings}"
    elif any(choice.too_large for choice in found):
        yield "! no layout fits: take more GPUs, or a smaller model or sequence"
    else:
        yield "! no layout can be: change what does not divide, or take another number of GPUs"


def _cache(config: RunConfig, separator_share: float) -> Iterator[str]:
    model, attention = config.model, config.attention
    number = 2 * 2 * model.key_value_heads * model.head_size
    full = num_full_layers(attention, model.num_layers)
    for length in (model.sequence_length, 16 * model.sequence_length):
        whole = number * model.num_layers * length
        kept = kept_tokens(attention, length, separator_share)
        own = number * (full * length + (model.num_layers - full) * kept)
        yield f"cache of a text of {length:,} tokens in 16 bits: {_mb(own)}, {own / whole:.1%} of the full {_mb(whole)}"


def _disk(needs: Needs) -> Iterator[str]:
    keep = needs.config.checkpoint.keep
    kept = f"the newest {keep}" if keep else f"one every {needs.config.checkpoint.every} steps, all kept,"
    yield f"checkpoints: {_gb(needs.checkpoint_bytes)} each; {kept} and one being written take {_gb(needs.disk_bytes)}"


def _gb(count: float) -> str:
    return f"{count / _GB:,.2f} GB" if count >= _GB / 100 or not count else _mb(count)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _hours(hours: float) -> str:
    return (
        f"{hours / 24:,.1f} days"
        if hours >= 48
        else f"{hours:,.1f} hours"
        if hours >= 1
        else f"{hours * 60:,.1f} minutes"
    )

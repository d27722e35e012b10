"""Every setting of a run: frozen sections, unknown keys forbidden, bounds beside each field."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_sep.config.engines import ENGINES, NOT_ENGINES
from megatron_sep.config.layout import engine_mistakes, split_mistakes
from megatron_sep.config.mass import mass_mistakes
from megatron_sep.config.position import PositionConfig, RotaryScalingConfig, SelfAdjustingConfig
from megatron_sep.config.section import Decay, Fraction, NonNegativeInt, OnOff, PositiveInt, Section, Seed
from megatron_sep.config.separators import Separators

Recompute = bool | Literal["selective"]


class ModelConfig(Section):
    """A decoder; the defaults are Pythia-160m, and other values make it a Llama."""

    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    num_key_value_heads: PositiveInt | None = None
    """Heads of keys and values, each shared by a group of query heads; null: as many as of queries."""
    head_dim: PositiveInt | None = None
    """Values of a query, key or value of one head; null: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP; null: 4 x hidden_size."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu"] = "gelu"
    """gelu_tanh is the approximation that GPT-NeoX's fused GELU computes."""
    biases: bool = True
    """Whether linear layers have one."""
    mlp_biases: bool | None = None
    """Whether those of the MLP have one; null: as `biases` says."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; null: the tokenizer's size, rounded up to a multiple of vocab_multiple."""
    vocab_multiple: PositiveInt = 128
    """GPT-NeoX's is 128 x the ranks of tensor parallelism."""
    sequence_length: PositiveInt = 2048
    """Tokens of a training sequence."""
    parallel_residual: bool = True
    """True: x + attention(ln1(x)) + mlp(ln2(x)), as Pythia. False: the MLP follows the attention."""
    position: PositionConfig = PositionConfig()
    rotary_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of each head that rotates."""
    rotary_base: PositiveInt = 10000
    rotary_scaling: RotaryScalingConfig | None = None
    self_adjusting_softmax: SelfAdjustingConfig | None = None
    """null: a softmax as it is."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    hidden_dropout: Fraction = 0.0
    attention_dropout: Fraction = 0.0
    init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "small_init"
    """How matrices start: normal(0, sqrt(2 / (5 h))), 2 / (layers sqrt(h)), init_std, or init_std / sqrt(2 layers)."""
    output_init: Literal["small_init", "wang_init", "normal", "scaled_normal"] = "wang_init"
    """The same for the matrices that write to the residual stream."""
    init_std: Annotated[float, Field(gt=0)] = 0.02

    @property
    def head_size(self) -> int:
        """Values of a query, key or value of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def heads_size(self) -> int:
        """Values of the queries of all heads of a token."""
        return self.num_attention_heads * self.head_size

    @property
    def mlp_has_biases(self) -> bool:
        """Whether it is set or as `biases` says."""
        return self.biases if self.mlp_biases is None else self.mlp_biases

    @property
    def key_value_heads(self) -> int:
        """Of one layer, whether they are set or as many as of queries."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def mlp_size(self) -> int:
        """Values between the two matrices of an MLP, whether they are set or 4 x hidden_size."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    def spelled_out(self) -> dict[str, int | bool]:
        """The settings that may be left to others, with the values that they have then."""
        return {
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size,
            "ffn_hidden_size": self.mlp_size,
            "mlp_biases": self.mlp_has_biases,
        }

    @property
    def gated_mlp(self) -> bool:
        """Whether a gate multiplies the MLP's values, as SwiGLU's does: what tells a Llama from a GPTNeoX."""
        return self.activation == "swiglu"

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide by num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is no multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if int(self.head_size * self.rotary_fraction) % 2:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} rotates {int(self.head_size * self.rotary_fraction)} of the "
                f"{self.head_size} values of a head; it must be an even number"
            )
        return self


class AnnealingConfig(Section):
    """A window that shrinks while a model learns to do with less: it halves at even distances."""

    start: PositiveInt
    """Tokens of the first window."""
    steps: PositiveInt
    """Steps of the run until the window is `attention.window`."""

    def windows(self, final: int) -> tuple[int, ...]:
        """The windows on the way to ``final``, each half of the one before it; every one has its share of the steps."""
        found = [self.start]
        while found[-1] // 2 > final:
            found.append(found[-1] // 2)
        return tuple(found)


class AttentionConfig(Section):
    """What a token sees; the defaults are full causal attention."""

    window: PositiveInt | None = None
    """Neighbouring tokens, the query included; null: all."""
    sinks: NonNegativeInt = 0
    """First tokens of a document that stay visible."""
    separators: Separators = ()
    """Texts whose tokens stay visible; `default`: . , ? ! : ; space, tab, newline. `{texts: default, merged: true}`:
    also what the tokenizer merged them into. The name of a list: the ids of the authors' code, for its tokenizer."""
    separator_ids: tuple[NonNegativeInt, ...] = ()
    """More of them by token id, as `megatron_sep separators` lists them."""
    stride: PositiveInt | None = None
    """FixLLM: every stride-th token after the sinks stays visible."""
    full_layers: tuple[int, ...] = ()
    """Layers that see everything, from 0; -1 is the last. [0]: H, [0, -1]: H/T."""
    document_boundaries: bool = False
    """True: packed documents do not see each other. False reproduces the paper."""
    anneal: AnnealingConfig | None = None
    """Shrink the window in training; null: it is `window` from the first step. Validation always uses `window`."""
    backend: Literal["auto", "triton", "flex", "reference"] = "auto"
    """auto: Triton on CUDA, the reference on CPU."""

    @model_validator(mode="after")
    def _window_shrinks(self) -> Self:
        if self.anneal and (self.window is None or self.anneal.start < self.window):
            raise ValueError(f"anneal.start={self.anneal.start} must be a window of at least window={self.window}")
        if self.anneal and self.window and self.anneal.steps < len(self.anneal.windows(self.window)):
            windows = ", ".join(map(str, self.anneal.windows(self.window)))
            raise ValueError(f"anneal.steps={self.anneal.steps} is less than a step for each of its windows {windows}")
        return self


class TokenizerConfig(Section):
    """The tokenizer of the data, in which separators are looked up."""

    path: Path
    """A Hugging Face tokenizer.json, a sentencepiece .model, or the vocab.json of GPT-2's kind with its merges.txt."""
    eod: str | None = None
    """Text of the end-of-document token; null: <|endoftext|>, else </s>."""


class ShardConfig(Section):
    """One source of a blend."""

    path: Path
    """Prefix of the shard: PATH.bin and PATH.idx, or PATH.idx and the parts PATH-00000-of-00082.bin ..."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, against the other weights."""


class InstructionsConfig(Section):
    """Prompts and responses to learn; the loss counts the responses alone."""

    path: Path
    """JSON lines."""
    prompt: str = "prompt"
    """Key of the prompt."""
    response: str = "response"
    """Key of the response."""
    template: str = "{prompt}\n"
    """Text that stands before the response."""
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the examples, from the end of the file, for validation."""
    on_long: Literal["fail", "drop"] = "fail"
    """An example longer than a sequence."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What a special token that is written out in a prompt or a response is: text like any other, or the token itself.
    Those of the template are tokens."""

    @model_validator(mode="after")
    def _template_has_a_place(self) -> Self:
        if "{prompt}" not in self.template:
            raise ValueError(f"template={self.template!r} has no {{prompt}} in it")
        return self


class DataConfig(Section):
    """What is trained and validated on, and in which order."""

    path: Path | None = None
    """Prefix of the shard: PATH.bin and PATH.idx, or PATH.idx and the parts PATH-00000-of-00082.bin ..."""
    blend: tuple[ShardConfig, ...] = ()
    """Several shards with weights, in place of `path`."""
    instructions: InstructionsConfig | None = None
    """Prompts and responses, in place of `path`; needs attention.document_boundaries."""
    split: tuple[Fraction, Fraction, Fraction] = (0.969, 0.03, 0.001)
    """Shares of the documents for training, validation and test."""
    order: Literal["samples", "sequences", "neox"] = "samples"
    """What a sample is. samples: sequence_length + 1 tokens of the documents joined in their order. sequences: each
    sequence of the shard is one sample (Pythia's pre-shuffled set: 2049 tokens; use `shuffle: false`). neox: as
    GPT-NeoX, with the documents and then the samples shuffled by numpy from the seed."""
    epoch_margin: Annotated[float, Field(ge=1)] = 1.0
    """`order: neox` shuffles the epochs that hold so many times the samples of the run; GPT-NeoX's `train_data_paths`
    asks for 1.005."""
    shuffle: bool = True
    """False: samples in the order of the shard."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Numpy's generators, which `order: neox` uses, take no larger one."""
    cache: Path | None = None
    """Folder for the index of `order: neox`, 16 bytes a document and 4 a sample; null: it is kept in memory."""

    @model_validator(mode="after")
    def _sources_and_split(self) -> Self:
        checks = (
            (abs(sum(self.split) - 1) > 1e-6, f"split={list(self.split)} adds up to {sum(self.split):g}, not 1"),
            (
                [bool(self.path), bool(self.blend), bool(self.instructions)].count(True) != 1,
                "path, blend and instructions: give one of them: a shard, several with weights, or examples",
            ),
            (self.order == "neox" and not self.shuffle, "order=neox is a shuffle; shuffle=false has order=samples"),
        )
        mistakes = [message for wrong, message in checks if wrong]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @property
    def sources(self) -> tuple[ShardConfig, ...]:
        """The shards with their weights; a single `path` has all."""
        return self.blend if self.path is None else (ShardConfig(path=self.path),)


class OptimizerConfig(Section):
    """AdamW, or Muon beside it, and the schedule; the defaults are Pythia-160m's."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers by Muon, at the rate and decay of AdamW (arXiv 2502.16982), the rest by AdamW.
    Its state is whole on every data-parallel rank: 8 bytes a weight of a matrix, where AdamW's 12 are shared."""
    momentum: Decay = 0.95
    """Of Muon."""
    lr: Annotated[float, Field(gt=0)] = 6e-4
    min_lr: Annotated[float, Field(ge=0)] = 6e-5
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0: no clipping."""
    decay: Literal["cosine", "linear", "linear_to_zero", "constant"] = "cosine"
    """How the rate falls to min_lr; linear_to_zero heads for 0 and stops at min_lr, as GPT-NeoX's linear does."""
    warmup: Fraction = 0.01
    """Share of the decay steps."""
    decay_steps: PositiveInt | None = None
    """Step at which min_lr is reached; null: the train.steps that the run was started with."""

    @model_validator(mode="after")
    def _lr_falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        return self


class LossScaleConfig(Section):
    """Dynamic loss scale of fp16."""

    initial: Annotated[float, Field(gt=0)] = 2.0**12
    minimum: Annotated[float, Field(gt=0)] = 1.0
    growth_interval: PositiveInt = 1000
    hysteresis: PositiveInt = 2


class SpikeConfig(Section):
    """A loss far above those before it."""

    policy: Annotated[Literal["off", "log", "skip", "rollback"], OnOff] = "log"
    """log: say it, with the documents of the step. skip: learn nothing from it; the loss is waited for before the
    optimizer's step. rollback: go back to the newest checkpoint, and on from there with the data after the spike."""
    deviations: Annotated[float, Field(gt=0)] = 8.0
    """Standard deviations above the mean of about the last hundred losses, 1 % of the mean each at least."""
    warmup: PositiveInt = 100
    """Steps before the first loss is judged."""
    rollbacks: PositiveInt = 3
    """Stop at the next spike after so many rollbacks to the same checkpoint."""


class TrainConfig(Section):
    """How long and how precisely; the defaults are Pythia's."""

    steps: PositiveInt = 143_000
    global_batch_size: PositiveInt = 1024
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 16
    """Sequences of one forward pass of one rank."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    loss_scale: LossScaleConfig = LossScaleConfig()
    seed: Seed = 1234
    """Of initial weights and dropout."""
    recompute: Recompute = False
    """Recompute each layer in the backward pass instead of keeping its activations; selective: the attention alone."""
    compile: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    """torch.compile of each layer; auto: on CUDA, where no layer talks to other ranks and no weight comes and goes."""
    cuda_graphs: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    """Record forward and backward pass once and replay them; auto: on CUDA, where a graph repeats all of a pass."""
    deterministic: bool = False
    """Two runs on the same machine are equal bit for bit; on CUDA full attention is slower for it."""
    operations: dict[str, str] = Field(default_factory=dict)
    """Implementations by operation, as in {layernorm: apex}, instead of those that fit best; named in
    kernels/registry.py."""
    loss_chunk: PositiveInt | None = None
    """Tokens whose logits exist at once: less memory, and the output layer's product is computed twice. null: all of a
    micro-batch."""
    eval_every: NonNegativeInt = 1000
    """Steps between validations; 0: none."""
    eval_batches: PositiveInt = 10
    """Global batches of one validation."""
    max_skipped_steps: PositiveInt = 50
    """Stop after so many steps in a row that change no weight: their gradient is not finite, or a spike is skipped."""
    spike: SpikeConfig = SpikeConfig()

    @field_validator("operations")
    @classmethod
    def _attention_has_its_own_key(cls, operations: dict[str, str]) -> dict[str, str]:
        if "sep_attention" in operations:
            raise ValueError(f"sep_attention={operations['sep_attention']}: set attention.backend to it")
        return operations


class ParallelConfig(Section):
    """What is left of the processes is data-parallel; the optimizer state is split among those (ZeRO-1)."""

    engine: str = "megatron"
    """What runs forward, backward and the optimizer over all ranks, and writes the checkpoints' tensors. megatron, or
    deepspeed: data-parallel alone, with `zero_stage` 1, 2 or 3, in bf16 or fp32."""
    zero_stage: Literal[1, 2, 3] = 1
    """What the data-parallel ranks split among themselves. 1: the optimizer's state; 2: gradients too; 3: weights too.
    2 and 3 need `engine: deepspeed`."""
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Parts that the layers of each pipeline stage are in, far apart in the model: above 1, the interleaved schedule.
    Its bubble is so many times smaller."""
    context: PositiveInt = 1
    """Ranks that share each sequence: every one holds an early and a late chunk of it."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel regions along the sequence."""
    timeout_minutes: Annotated[float, Field(gt=0, le=525_600)] = 5.0
    """How long a process waits for one that died, froze or hangs before the job ends; a year at most."""

    @property
    def splits_layers(self) -> bool:
        """Does a layer talk to other ranks in its midst?"""
        return self.tensor > 1 or self.context > 1

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, engine: str) -> str:
        if engine not in ENGINES:
            raise ValueError(NOT_ENGINES.get(engine.lower(), f"no such engine; choose {', '.join(ENGINES)}"))
        return engine

    @model_validator(mode="after")
    def _axes_agree(self) -> Self:
        axes = ("tensor", "pipeline", "context")
        split = [f"{axis}={getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1]
        checks = (
            (self.sequence_parallel and self.tensor == 1, "sequence_parallel=true needs tensor > 1"),
            (
                self.virtual_pipeline > 1 and self.pipeline == 1,
                f"virtual_pipeline={self.virtual_pipeline} needs pipeline > 1",
            ),
            (
                self.engine == "megatron" and self.zero_stage > 1,
                f"zero_stage={self.zero_stage} needs engine=deepspeed; megatron's splits the optimizer's state alone",
            ),
            (
                self.engine == "deepspeed" and bool(split),
                f"engine=deepspeed is data-parallel alone: set {', '.join(split)} to 1, or engine=megatron",
            ),
        )
        mistakes = [message for wrong, message in checks if wrong]
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


class CheckpointConfig(Section):
    """When a run is saved, and what it starts from."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep: PositiveInt | None = None
    """Newest checkpoints to keep; null: all."""
    background: bool = True
    """Train on while a checkpoint is written, from a copy of it in the host's memory; false: wait for it."""
    export_every: PositiveInt | None = None
    """Each so many checkpoints, one goes to RUN/export too, as a directory that transformers reads; null: none."""
    init_from: Path | None = None
    """Weights to start from, with a new optimizer: a checkpoint, a run's dir, or a Hugging Face directory of GPTNeoX or
    Llama. null: weights drawn from train.seed."""
    init_optimizer: bool = False
    """Take the optimizer over with the weights: ZeRO-1's of a GPT-NeoX checkpoint that `init_from` names."""
    init_step: NonNegativeInt = 0
    """Step that a run with `init_from` starts at: schedule and data go on from there. 0: both begin anew."""

    @model_validator(mode="after")
    def _step_needs_weights(self) -> Self:
        if self.init_step and self.init_from is None:
            raise ValueError(f"init_step={self.init_step} needs init_from, the weights of that step")
        if self.init_optimizer and self.init_from is None:
            raise ValueError("init_optimizer=true needs init_from, the checkpoint that it lies in")
        return self


class MetricsConfig(Section):
    """Where the numbers of a run go besides metrics.jsonl."""

    every: PositiveInt = 10
    """Steps between lines."""
    attention_mass_every: PositiveInt | None = None
    """Steps between looks at what attention pays to first tokens, separators, the window and the rest, on the first
    rows of the data; null: none. A look is one more forward pass of a micro-batch, and changes nothing in training."""
    console: Literal["auto", "lines", "off"] = "auto"
    """auto: one line that changes on a terminal, else a line below the other; off: none, as `train --quiet`."""
    tensorboard: bool = False
    wandb: Annotated[Literal["off", "online", "offline"], OnOff] = "off"
    wandb_project: str = "megatron_sep"


class RunConfig(Section):
    """One run. Its checkpoints and metrics go to `dir`."""

    dir: Path
    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        layers = self.model.num_layers
        instructions = self.data.instructions
        outside = [i for i in self.attention.full_layers if not -layers <= i < layers]
        checks = (
            (bool(outside), f"attention.full_layers={outside}: no such layer in a model with {layers}"),
            (
                self.train.global_batch_size % self.train.micro_batch_size != 0,
                f"train.global_batch_size={self.train.global_batch_size} is no multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}",
            ),
            (
                instructions is not None and not self.attention.document_boundaries,
                "data.instructions packs several examples into a sequence: set attention.document_boundaries: true",
            ),
            (
                instructions is not None and instructions.valid == 0 and self.train.eval_every > 0,
                "data.instructions.valid=0 leaves no examples to validate on: raise it, or set train.eval_every: 0",
            ),
            (
                self.checkpoint.init_step >= self.train.steps,
                f"checkpoint.init_step={self.checkpoint.init_step} leaves nothing of train.steps={self.train.steps}",
            ),
            (
                self.parallel.sequence_parallel and self.train.loss_chunk is not None,
                f"train.loss_chunk={self.train.loss_chunk} would gather the sequence anew for each chunk: set "
                "parallel.sequence_parallel: false, or train.loss_chunk: null",
            ),
            (
                self.train.spike.policy == "rollback" and self.data.order == "neox",
                "train.spike.policy=rollback takes more samples than the run has steps, data.order=neox holds no more: "
                "set another of the two",
            ),
        )
        mistakes = [message for wrong, message in checks if wrong] + split_mistakes(self.model, self.parallel)
        mistakes += engine_mistakes(self.parallel, self.train, self.optimizer)
        mistakes += mass_mistakes(self.metrics.attention_mass_every, self.model, self.attention, self.parallel)
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

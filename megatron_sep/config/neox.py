"""GPT-NeoX, Pythia and official SepLLM files: one table says of each key what becomes of it.

A key is mapped to ours, ignored or refused, the latter two with the reason; dashes and underscores are the same. Keys
that only mean something together (`Part`) are put together in `neox_parts`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megatron_sep.config.neox_parts import COMPOSERS, NeoxError, Tree


@dataclass(frozen=True)
class To:
    """Becomes ``path`` of our configuration."""

    path: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Part:
    """Means something together with other keys."""

    of: str


@dataclass(frozen=True)
class Ignored:
    """Means nothing here, and may stand in a file."""

    reason: str


@dataclass(frozen=True)
class Only:
    """Taken where it has one of these values; refused with the reason otherwise."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Refused:
    """Cannot be taken over, whatever its value."""

    reason: str


Rule = To | Part | Ignored | Only | Refused


def _choose(key: str, choices: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A value through a table; one that is not there is refused."""

    def convert(value: Any) -> Any:
        if value not in choices:
            raise NeoxError(f"{key}={value!r}: known are {', '.join(map(repr, choices))}")
        return choices[value]

    return convert


def _split(value: Any) -> list[float]:
    shares = [float(part) for part in str(value).split(",")]
    return [share / sum(shares) for share in [*shares, 0.0, 0.0][:3]]


_INIT = {"small_init": "small_init", "wang_init": "wang_init", "normal": "normal"}
_LOADER = "the data are read by this project's own loader"
_FUSION = "which kernels are fused is chosen from the hardware"
_ZERO = "the optimizer state is always split among the data-parallel ranks (ZeRO-1)"
_LAUNCH = "processes are started by torchrun, SLURM or deepspeed, and found in their environment"
_LOGS = "status lines are a matter of `metrics`"
_RATIO = "the visible share is always logged, as attention/visible"
_GENERATION = "the window of generation is that of training"
_BIPE = "bilevel positions are not part of this program"
_SOFTMAX = "Self-Adjust softmax is not part of this program"
_SHARE = "with train_data_paths all of the data is trained on; set data.split and train.eval_every to validate"

TABLE: dict[str, Rule] = {
    # the model
    "num_layers": To("model.num_layers"),
    "hidden_size": To("model.hidden_size"),
    "num_attention_heads": To("model.num_attention_heads"),
    "num_kv_heads": To("model.num_key_value_heads"),
    "intermediate_size": To("model.ffn_hidden_size"),
    "seq_length": To("model.sequence_length"),
    "max_position_embeddings": Ignored("rotary positions have no largest one"),
    "norm": To("model.norm", _choose("norm", {"layernorm": "layernorm", "rmsnorm": "rmsnorm"})),
    "layernorm_epsilon": Part("norm_eps"),
    "rms_norm_epsilon": Part("norm_eps"),
    "activation": To("model.activation", _choose("activation", {"gelu": "gelu", "swiglu": "swiglu"})),
    "use_bias_in_norms": Only((True,), "LayerNorm has a bias, RMSNorm has none"),
    "use_bias_in_attn_linear": Part("biases"),
    "use_bias_in_mlp": Part("biases"),
    "pos_emb": Only(("rotary",), "positions are rotary, and weights trained with others cannot be converted"),
    "rotary_pct": To("model.rotary_fraction"),
    "rotary_emb_base": To("model.rotary_base"),
    "no_weight_tying": To("model.tie_embeddings", lambda value: not value),
    "gpt_j_residual": To("model.parallel_residual"),
    "gpt_j_tied": Only((False,), "both residual branches have a norm of their own"),
    "output_layer_parallelism": Only(("column",), "the output layer is split along the vocabulary"),
    "attention_config": Part("attention"),
    "make_vocab_size_divisible_by": Part("vocab_multiple"),
    "hidden_dropout": To("model.hidden_dropout"),
    "attention_dropout": To("model.attention_dropout"),
    "init_method": To("model.init", _choose("init_method", _INIT)),
    "output_layer_init_method": To("model.output_init", _choose("output_layer_init_method", _INIT)),
    "init_method_std": To("model.init_std"),
    "apply_query_key_layer_scaling": Only((False,), "scores are scaled by 1 / sqrt(head size) alone"),
    "attention_softmax_in_fp32": Ignored("the softmax is always computed in fp32"),
    "precision": Part("precision"),
    "fp16": Part("precision"),
    "bf16": Part("precision"),
    "fp32_allreduce": Ignored("gradients are always summed in fp32"),
    "use_mup": Only((False,), "muP is not part of this program"),
    "mup_rp_embedding_mult": Ignored("use_mup is off"),
    # kernels
    "scaled_upper_triang_masked_softmax_fusion": Ignored(_FUSION),
    "scaled_masked_softmax_fusion": Ignored(_FUSION),
    "bias_gelu_fusion": Ignored(_FUSION),
    "bias_dropout_fusion": Ignored(_FUSION),
    "layernorm_fusion": Ignored(_FUSION),
    "rmsnorm_fusion": Ignored(_FUSION),
    "rope_fusion": Ignored(_FUSION),
    "use_flashattn_swiglu": Ignored(_FUSION),
    "use_sep_attn_kernel_accelerator": Ignored("attention.backend picks the kernel; auto is the fastest there is"),
    "recompile_sep_attn_kernel": Ignored("layers are compiled once for each pattern"),
    # parallelism
    "pipe_parallel_size": To("parallel.pipeline", lambda value: max(1, value)),
    "model_parallel_size": To("parallel.tensor"),
    "sequence_parallel": To("parallel.sequence_parallel"),
    "is_pipe_parallel": Ignored("parallel.pipeline says it"),
    "distributed_backend": Ignored("nccl on GPU, gloo on CPU"),
    "zero_optimization": Part("zero"),
    "zero_allow_untested_optimizer": Ignored(_ZERO),
    "world_size": Part("batch"),
    "global_num_gpus": Part("batch"),
    "num_gpus": Part("batch"),
    "launcher": Ignored(_LAUNCH),
    "hostfile": Ignored(_LAUNCH),
    "deepspeed": Ignored(_LAUNCH),
    "deepspeed_mpi": Ignored(_LAUNCH),
    "deepspeed_slurm": Ignored(_LAUNCH),
    "deepspeed_extra_args": Ignored(_LAUNCH),
    "slurm_comment": Ignored(_LAUNCH),
    "master_port": Ignored(_LAUNCH),
    "include": Ignored(_LAUNCH),
    "num_nodes": Ignored(_LAUNCH),
    # optimizer and schedule
    "optimizer": Part("optimizer"),
    "scheduler": Ignored("the schedule is lr_decay_style, warmup and lr_decay_iters"),
    "min_lr": To("optimizer.min_lr"),
    "lr": To("optimizer.lr"),
    "weight_decay": To("optimizer.weight_decay"),
    "gradient_clipping": To("optimizer.clip_grad"),
    "clip_grad": To("optimizer.clip_grad"),
    "lr_decay_style": To(
        "optimizer.decay", _choose("lr_decay_style", {"cosine": "cosine", "linear": "linear", "constant": "constant"})
    ),
    "lr_decay_iters": To("optimizer.decay_steps"),
    "warmup": To("optimizer.warmup"),
    "override_lr_scheduler": Ignored("the schedule is always that of the file"),
    "use_checkpoint_lr_scheduler": Ignored("the schedule is always that of the file"),
    # batches
    "train_batch_size": Part("batch"),
    "train_micro_batch_size_per_gpu": Part("batch"),
    "gradient_accumulation_steps": Part("batch"),
    "gas": Part("batch"),
    "batch_size": Part("batch"),
    "train_iters": To("train.steps"),
    "seed": To("train.seed"),
    "eval_interval": Part("data"),
    "eval_iters": To("train.eval_batches"),
    "do_train": Only((True,), "`train` trains"),
    "do_valid": Ignored("train.eval_every says it"),
    "do_test": Ignored("the test split is neither trained nor validated on"),
    # recomputation
    "checkpoint_activations": To("train.recompute"),
    "checkpoint_num_layers": Ignored("each layer is recomputed on its own"),
    "partition_activations": Ignored("parallel.sequence_parallel splits activations"),
    "synchronize_each_layer": Ignored("no synchronisation is needed"),
    "contiguous_checkpointing": Ignored("torch's allocator keeps memory whole"),
    "checkpoint_in_cpu": Only((False,), "activations stay on the device"),
    # checkpoints
    "save": To("dir"),
    "load": Part("load"),
    "finetune": Part("load"),
    "checkpoint_factor": To("checkpoint.every"),
    "save_interval": To("checkpoint.every"),
    "checkpoint_scale": Only(("linear",), "checkpoints are made at even distances"),
    "extra_save_iters": Ignored("checkpoints are made every checkpoint.every steps"),
    "keep_last_n_checkpoints": To("checkpoint.keep"),
    "checkpoint_validation_with_forward_pass": Ignored("a checkpoint is verified by the SHA-256 of its files"),
    "save_base_shapes": Ignored("use_mup is off"),
    "no_save_optim": Only((False,), "a checkpoint always holds the optimizer"),
    "no_save_rng": Ignored("nothing random is saved; all of it follows from the seed"),
    "no_load_optim": Only((False,), "give checkpoint.init_from to start from weights with a new optimizer"),
    "no_load_rng": Ignored("nothing random is saved; all of it follows from the seed"),
    "iteration": Ignored("a run knows where it stands"),
    # data
    "data_path": To("data.path"),
    "train_data_paths": Part("data"),
    "valid_data_paths": Ignored(_SHARE),
    "test_data_paths": Ignored(_SHARE),
    "train_data_weights": Part("data"),
    "valid_data_weights": Ignored(_SHARE),
    "test_data_weights": Ignored(_SHARE),
    "split": To("data.split", _split),
    "data_impl": Only(("mmap", "infer"), "shards are memory-mapped"),
    "mmap_warmup": Ignored(_LOADER),
    "num_workers": Ignored(_LOADER),
    "eod_mask_loss": Only((False,), "the loss counts the end-of-document token"),
    "reset_position_ids": Only((False,), "set attention.document_boundaries: true; rotary positions are relative"),
    "reset_attention_mask": To("attention.document_boundaries"),
    "tokenizer_type": Only(
        ("HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer"), "give tokenizer.path: a tokenizer.json or .model"
    ),
    "vocab_file": To("tokenizer.path"),
    "merge_file": Refused("byte-pair merges in a file of their own are not read; give vocab_file as a tokenizer.json"),
    # logs
    "log_interval": To("metrics.every"),
    "steps_per_print": Ignored(_LOGS),
    "wall_clock_breakdown": Ignored(_LOGS),
    "log_dir": Ignored("logs go to the run's dir"),
    "log_grad_norm": Ignored("the gradient norm is always logged"),
    "log_param_norm": Ignored(_LOGS),
    "log_gradient_noise_scale": Ignored(_LOGS),
    "log_optimizer_states": Ignored(_LOGS),
    "tensorboard_dir": To("metrics.tensorboard", bool),
    "tensorboard_writer": Ignored(_LOGS),
    "use_wandb": To("metrics.wandb", lambda value: "online" if value else "off"),
    "wandb_project": To("metrics.wandb_project"),
    "wandb_group": Ignored("a run has the name of its dir"),
    "wandb_team": Ignored("wandb takes the team from its own settings"),
    "wandb_host": Ignored("wandb takes the host from its own settings"),
    "wandb_init_all_ranks": Ignored("the first rank logs for all"),
    "dump_state": Ignored(_LOGS),
    "flops_profiler": Ignored("floating-point operations are counted from the shapes, as speed/model_flops"),
    # SepLLM
    "separator_token_ids": Part("attention"),
    "init_tok_max_idx": Part("attention"),
    "prefill_local_window_size": Part("attention"),
    "use_prefill_local_win_sizes_wrt_layers": Part("attention"),
    "prefill_loc_win_size_list": Part("attention"),
    "use_original_full_atten": Part("attention"),
    "streamingllm": Part("attention"),
    "use_fixed_sep_intervals": Part("attention"),
    "fixed_sep_intervals_list": Part("attention"),
    "generate_local_window_size": Ignored(_GENERATION),
    "use_generate_local_win_sizes_wrt_layers": Ignored(_GENERATION),
    "generate_win_loc_size_list": Ignored(_GENERATION),
    "prefill_k": Only((0,), "was never implemented"),
    "generate_k": Only((0,), "was never implemented"),
    "layer_num": To("model.num_layers"),
    "padding_id": Ignored("training data have no padding"),
    "special_tokens_id": Ignored("training data have no padding"),
    "batch_adaptive_init_pos": Ignored("training data have no padding"),
    "exclude_diagonal": Only((True,), "the window counts the query itself"),
    "print_kv_ratio": Ignored(_RATIO),
    "print_ratio_intervals": Ignored(_RATIO),
    "use_bipe": Only((False,), _BIPE),
    "bipe_seps": Ignored("use_bipe is off"),
    "use_sa_softmax": Only((False,), _SOFTMAX),
    "use_sa_softmax_no_deno": Only((False,), _SOFTMAX),
    "sa_numerator_bias": Ignored("use_sa_softmax is off"),
    "sa_denominator_bias": Ignored("use_sa_softmax is off"),
}
NATIVE_TOO = {"optimizer", "dir"}
"""Keys that a file of ours has as well: they do not tell the two kinds apart."""


def spell(key: str) -> str:
    """Dashes, underscores and case do not matter."""
    return key.replace("-", "_").lower()


def is_neox(tree: Mapping[str, Any], native: set[str]) -> bool:
    """Whether a file is GPT-NeoX's: it has a key of the table, and no section of ours."""
    keys = set(map(str, tree))
    return any(spell(key) in TABLE for key in keys - native) and not keys & (native - NATIVE_TOO)


def translate(tree: Mapping[str, Any], name: str) -> Tree:
    """Our configuration from the keys of GPT-NeoX's; ``name`` becomes the run's dir where the file has no `save`.

    Raises NeoxError, naming every key that is not known or refused at once.
    """
    values, mistakes = _spelled(tree)
    found: Tree = {}
    for key, value in values.items():
        rule = TABLE[key]
        try:
            if isinstance(rule, To):
                _put(found, rule.path, rule.convert(value))
            elif isinstance(rule, Refused):
                raise NeoxError(f"{key}={value!r}: {rule.reason}")
            elif isinstance(rule, Only) and value not in rule.values:
                known = " or ".join(map(repr, rule.values))
                raise NeoxError(f"{key}={value!r} is refused: {rule.reason}; {key}={known} is taken")
        except (NeoxError, TypeError, ValueError) as error:
            mistakes.append(str(error))
    for compose in COMPOSERS:
        try:
            for path, value in compose(values).items():
                _put(found, path, value)
        except (NeoxError, TypeError, ValueError, AttributeError) as error:
            mistakes.append(str(error))
    if mistakes:
        raise NeoxError("\n".join(mistakes))
    found.setdefault("dir", f"runs/{name}")
    return found


def fate(key: str, value: Any) -> str:
    """What becomes of a key, in words."""
    rule = TABLE[spell(key)]
    if isinstance(rule, To):
        return f"becomes {rule.path}"
    if isinstance(rule, Part):
        return f"goes into {rule.of}"
    if isinstance(rule, Only) and value in rule.values:
        return "is as here"
    return f"{type(rule).__name__.lower()}: {rule.reason}"


def _spelled(tree: Mapping[str, Any]) -> tuple[Tree, list[str]]:
    """The keys in one spelling, without those that are empty; a message for each that is not known."""
    values: Tree = {}
    mistakes = []
    for key, value in tree.items():
        name = spell(str(key))
        if name not in TABLE:
            near = get_close_matches(name, list(TABLE), n=1, cutoff=0.5)
            mistakes.append(f"{key}: no key of GPT-NeoX or SepLLM" + (f"; did you mean {near[0]}?" if near else ""))
        elif name in values and values[name] != value:
            mistakes.append(f"{key} is both {values[name]!r} and {value!r}, in two spellings")
        elif value is not None:
            values[name] = value
    return values, mistakes


def _put(tree: Tree, path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value

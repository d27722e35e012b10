"""Our configuration written back as GPT-NeoX's and SepLLM's keys, so that reading them gives the same again."""

from collections.abc import Callable, Mapping
from itertools import groupby
from math import log2
from typing import Any

from megatron_sep.config.neox import translate
from megatron_sep.config.neox_attention import NAMED_SEPARATORS
from megatron_sep.config.neox_rules import NeoxError, Tree
from megatron_sep.config.schema import AttentionConfig, ModelConfig, RunConfig, TrainConfig
from megatron_sep.config.section import leaves

_UNSAID = (
    "metrics.wandb",
    "parallel.timeout_minutes",
    "train.compile",
    "train.cuda_graphs",
    "train.deterministic",
    "train.loss_chunk",
    "train.max_skipped_steps",
    "train.operations",
    "train.spike",
    "checkpoint.background",
    "attention.backend",
    "data.cache",
    "model.vocab_size",
)
"""Settings that GPT-NeoX has no key for and that nothing learnt depends on, by how they begin."""
_GO_ALONG = {"train.micro_batch_size": ("train_batch_size",), "tokenizer.path": ("tokenizer_type",)}
"""Keys that say nothing where a setting is missing."""


def as_neox(config: RunConfig, missing: Mapping[str, str]) -> tuple[Tree, list[str]]:
    """The keys, and a line for each setting that they leave unsaid; what is ``missing`` from a sketch is left out.

    Raises NeoxError, naming every setting that matters and has no key.
    """
    keys = {key: value for part in _PARTS for key, value in part(config).items() if value is not None}
    unknown = {*missing.values(), *(key for path in missing for key in _GO_ALONG.get(path, ()))}
    keys = {key: value for key, value in keys.items() if key not in unknown}
    found = RunConfig.model_validate(_filled(translate(keys, config.dir.name), config, missing))
    before, after = (dict(leaves(spelled_out(each))) for each in (config, found))
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    lost = sorted(key for key in changed if not key.startswith(_UNSAID) and key not in missing)
    if lost:
        said = "\n".join(f"{key}={before.get(key)!r}: GPT-NeoX and SepLLM have no key for it" for key in lost)
        raise NeoxError(said)
    return keys, [f"{key}: {before.get(key)}" for key in sorted(set(changed) - missing.keys())]


def _filled(tree: Tree, config: RunConfig, missing: Mapping[str, str]) -> Tree:
    """The tree with the placeholders that a sketch has for what is missing."""
    whole = config.model_dump(mode="json")
    for path in {*missing, "tokenizer.path"}:
        section, _, leaf = path.partition(".")
        if section in whole and leaf not in tree.get(section, {}):
            tree.setdefault(section, {})[leaf] = whole[section][leaf]
    if config.data.path is None:
        tree.setdefault("data", {}).setdefault("path", "none")
    return tree


def spelled_out(config: RunConfig) -> Tree:
    """Every setting with its value where null or a negative number means one."""
    layers = config.model.num_layers
    tree = config.model_dump(mode="json")
    tree["model"] |= config.model.spelled_out()
    tree["attention"]["full_layers"] = sorted({layer % layers for layer in config.attention.full_layers})
    return tree


def _model(config: RunConfig) -> Tree:
    model = config.model
    tensor = config.parallel.tensor
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_key_value_heads,
        "seq_length": model.sequence_length,
        "max_position_embeddings": model.position.length if model.position.bilevel else model.sequence_length,
        "norm": model.norm,
        ("rms_norm_epsilon" if model.norm == "rmsnorm" else "layernorm_epsilon"): model.norm_eps,
        "rotary_pct": model.rotary_fraction,
        "rotary_emb_base": model.rotary_base,
        "no_weight_tying": not model.tie_embeddings,
        "gpt_j_residual": model.parallel_residual,
        "make_vocab_size_divisible_by": model.vocab_multiple // tensor,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method": model.init,
        "output_layer_init_method": model.output_init,
        "init_method_std": model.init_std,
        "use_bias_in_attn_linear": model.biases,
        "use_bias_in_mlp": model.mlp_has_biases,
        "activation": model.activation,
        **_width(model),
        **_positions(model),
        **_softmax(model),
    }


def _width(model: ModelConfig) -> Tree:
    """GPT-NeoX takes two thirds of the size of a gated MLP for its two halves."""
    if model.gated_mlp:
        return {"intermediate_size": 3 * model.mlp_size}
    return {} if model.ffn_hidden_size is None else {"intermediate_size": model.mlp_size}


def _positions(model: ModelConfig) -> Tree:
    position = model.position
    if not position.bilevel:
        return {"pos_emb": position.kind}
    return {
        "pos_emb": position.segments,
        "USE_BiPE": True,
        "BiPE_seps": _ids(position.separators, position.separator_ids),
    }


def _softmax(model: ModelConfig) -> Tree:
    asked = model.self_adjusting_softmax
    if asked is None:
        return {}
    if not asked.denominator:
        return {"USE_SA_SOFTMAX_NO_DENO": True}
    biases = {"SA_Numerator_Bias": asked.numerator_bias, "SA_Denominator_Bias": asked.denominator_bias}
    return {"USE_SA_SOFTMAX": True, **biases}


def _ids(separators: Any, more: tuple[int, ...]) -> list[int]:
    """Raises NeoxError for texts whose ids a tokenizer would have to tell."""
    named = {name: sorted(ids) for ids, name in NAMED_SEPARATORS.items()}
    if separators in named and not more:
        return named[separators]
    if separators == ():
        return list(more)
    raise NeoxError(
        f"separators={separators!r}: GPT-NeoX's files have token ids: give attention.separator_ids alone, as "
        "`megatron_sep separators` lists them"
    )


def _attention(config: RunConfig) -> Tree:
    attention, layers = config.attention, config.model.num_layers
    full = sorted({layer % layers for layer in attention.full_layers})
    found: Tree = {"reset_attention_mask": attention.document_boundaries}
    if attention.window is None:
        return found
    plain = not (attention.sinks or attention.separators or attention.separator_ids or attention.stride)
    if plain:
        kinds = groupby("global" if layer in full else "flash" for layer in range(layers))
        config_of = [[[kind], len(list(each))] for kind, each in kinds]
        return found | {"attention_config": config_of, "sliding_window_width": attention.window}
    return found | {"init_tok_max_idx": attention.sinks - 1, **_windows(config, full), **_landmarks(attention)}


def _windows(config: RunConfig, full: list[int]) -> Tree:
    window, length = config.attention.window, config.model.sequence_length
    if not full:
        return {"prefill_local_window_size": window}
    sizes = [length if layer in full else window for layer in range(config.model.num_layers)]
    return {"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": True, "prefill_loc_win_size_list": sizes}


def _landmarks(attention: AttentionConfig) -> Tree:
    if attention.stride is not None:
        return {"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [attention.stride]}
    if not (attention.separators or attention.separator_ids):
        return {"streamingLLM": True}
    return {"separator_token_ids": _ids(attention.separators, attention.separator_ids)}


def _training(config: RunConfig) -> Tree:
    train, optimizer = config.train, config.optimizer
    adam = {"lr": optimizer.lr, "betas": list(optimizer.betas), "eps": optimizer.eps}
    decays = {"cosine": "cosine", "linear_to_zero": "linear", "constant": "constant"}
    if optimizer.decay not in decays:
        raise NeoxError("optimizer.decay=linear: GPT-NeoX's linear heads for 0; it is linear_to_zero here")
    return {
        "train_iters": train.steps,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "train_batch_size": train.global_batch_size,
        "optimizer": {"type": "Adam", "params": adam},
        "min_lr": optimizer.min_lr,
        "weight_decay": optimizer.weight_decay,
        "gradient_clipping": optimizer.clip_grad,
        "lr_decay_style": decays[optimizer.decay],
        "lr_decay_iters": optimizer.decay_steps,
        "warmup": optimizer.warmup,
        "seed": train.seed,
        "checkpoint_activations": train.recompute,
        "eval_interval": train.eval_every,
        "eval_iters": train.eval_batches,
        **_precision(train),
    }


def _precision(train: TrainConfig) -> Tree:
    if train.precision == "fp32":
        return {}
    if train.precision == "bf16":
        return {"precision": "bfloat16"}
    scale = train.loss_scale
    power = log2(scale.initial)
    if power != int(power):
        raise NeoxError(f"train.loss_scale.initial={scale.initial}: GPT-NeoX begins at a power of two")
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": int(power),
            "loss_scale_window": scale.growth_interval,
            "hysteresis": scale.hysteresis,
            "min_loss_scale": scale.minimum,
        }
    }


def _places(config: RunConfig) -> Tree:
    checkpoint, metrics = config.checkpoint, config.metrics
    kinds = {".model": "SPMTokenizer"} | ({"vocab.json": "GPT2BPETokenizer"})
    name = config.tokenizer.path.name
    start = {"finetune": True, "load": str(checkpoint.init_from)} if checkpoint.init_from else {}
    return {
        **_source(config),
        "vocab_file": str(config.tokenizer.path),
        "tokenizer_type": next((kind for end, kind in kinds.items() if name.endswith(end)), "HFTokenizer"),
        "pipe_parallel_size": config.parallel.pipeline,
        "model_parallel_size": config.parallel.tensor,
        "sequence_parallel": config.parallel.sequence_parallel,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "save": str(config.dir),
        **start,
        "checkpoint_factor": checkpoint.every,
        "keep_last_n_checkpoints": checkpoint.keep,
        "log_interval": metrics.every,
        "tensorboard_dir": str(config.dir / "tensorboard") if metrics.tensorboard else None,
        "use_wandb": metrics.wandb == "online",
        "wandb_project": metrics.wandb_project,
    }


def _source(config: RunConfig) -> Tree:
    """One set that is split, or one to train on alone, which GPT-NeoX asks for more samples than it needs."""
    data = config.data
    path = None if data.path is None else str(data.path)
    if data.epoch_margin == 1.0:
        return {"data_path": path, "split": _split(data.split)}
    return {"train_data_paths": [path], "eval_interval": None}


def _split(shares: tuple[float, ...]) -> str:
    """Numbers that are read as these shares of their sum, whole ones where there are some."""
    for times in (1, 10, 100, 1000, 10_000):
        whole = [round(share * times) for share in shares]
        if sum(whole) and tuple(number / sum(whole) for number in whole) == tuple(shares):
            return ",".join(map(str, whole))
    return ",".join(map(repr, shares))


_PARTS: tuple[Callable[[RunConfig], Tree], ...] = (_model, _attention, _training, _places)

"""GPT-NeoX keys that only mean something together, each set turned into values of ours."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sep.config import neox_attention, neox_model, neox_position
from megatron_sep.config.neox_rules import NeoxError, Tree, describes_a_model
from megatron_sep.config.tokenizer_files import merge_files

_MARGIN = 1.005
"""GPT-NeoX asks each of `train_data_paths` for so many times its samples."""
_TOKENIZERS = ("GPT2BPETokenizer", "HFTokenizer", "HFGPT2Tokenizer", "SPMTokenizer")


def _batch(values: Tree) -> Tree:
    """The global batch, as GPT-NeoX makes it from the ranks that are there; of three sizes one may be left out."""
    micro = values.get("train_micro_batch_size_per_gpu", values.get("batch_size"))
    whole = values.get("train_batch_size")
    steps = (values.get("gradient_accumulation_steps") or values.get("gas") or 1) * data_parallel_ranks(values)
    if micro is not None:
        return {"train.micro_batch_size": micro, "train.global_batch_size": micro * steps if whole is None else whole}
    if whole is not None:
        return {"train.micro_batch_size": whole // steps, "train.global_batch_size": whole}
    return {}


def data_parallel_ranks(values: Mapping[str, Any]) -> int:
    """From the file, or from the environment of the job that reads it."""
    world = next((values[key] for key in ("global_num_gpus", "world_size", "num_gpus") if key in values), None)
    if world is None:
        world = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    model_parallel = values.get("model_parallel_size", 1) * max(1, values.get("pipe_parallel_size", 1))
    return max(1, int(world) // int(model_parallel))


def _precision(values: Tree) -> Tree:
    if not (describes_a_model(values) or values.keys() & {"fp16", "bf16", "precision"}):
        return {}
    fp16, named = values.get("fp16", {}), values.get("precision")
    of_fp16 = fp16.get("type", named) if fp16.get("enabled") else None
    if values.get("bf16", {}).get("enabled") or {named, of_fp16} & {"bfloat16", "bf16"}:
        return {"train.precision": "bf16"}
    if not (fp16.get("enabled") or named == "fp16"):
        return {"train.precision": "fp32"}
    if fp16.get("loss_scale", 0) != 0:
        raise NeoxError(f"fp16.loss_scale={fp16['loss_scale']}: the loss scale is dynamic, loss_scale=0")
    names = {"min_loss_scale": "minimum", "loss_scale_window": "growth_interval", "hysteresis": "hysteresis"}
    scale = {ours: fp16[theirs] for theirs, ours in names.items() if theirs in fp16}
    if "initial_scale_power" in fp16:
        scale["initial"] = 2.0 ** fp16["initial_scale_power"]
    return {"train.precision": "fp16", "train.loss_scale": scale}


def _optimizer(values: Tree) -> Tree:
    optimizer = values.get("optimizer", {})
    kind = str(optimizer.get("type", "Adam"))
    if kind.lower() not in ("adam", "adamw"):
        raise NeoxError(f"optimizer.type={kind!r}: AdamW is the only optimizer")
    params = dict(optimizer.get("params", {}))
    norm, clip = params.pop("max_grad_norm", None), values.get("gradient_clipping", 1.0)
    strange = [f"optimizer.params.{key}: no such key" for key in params if key not in ("lr", "betas", "eps")]
    if norm not in (None, clip):
        strange.append(f"optimizer.params.max_grad_norm={norm}: gradient_clipping is {clip}; leave one of them out")
    if "lr" in values and values["lr"] != params.get("lr"):
        strange.append(f"lr={values['lr']}: GPT-NeoX takes the rate of optimizer.params.lr alone; give it there")
    if strange:
        raise NeoxError("\n".join(strange))
    return {f"optimizer.{key}": value for key, value in params.items()}


def _rest(values: Tree) -> Tree:
    found: Tree = {}
    if "make_vocab_size_divisible_by" in values:
        multiple = values["make_vocab_size_divisible_by"] * values.get("model_parallel_size", 1)
        found = {"model.vocab_multiple": multiple}
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage > 1:
        found |= {"parallel.engine": "deepspeed", "parallel.zero_stage": stage}
    _check_rest(values)
    if values.get("finetune") and "load" in values:
        found["checkpoint.init_from"] = values["load"]
    return found


def _tokenizer(values: Tree) -> Tree:
    """The file of a tokenizer, or of its vocabulary with the merges beside it."""
    if "vocab_file" not in values:
        return {}
    kind, vocab = values.get("tokenizer_type", "GPT2BPETokenizer"), Path(values["vocab_file"])
    if kind not in _TOKENIZERS:
        raise NeoxError(
            f"tokenizer_type={kind!r}: known are {', '.join(map(repr, _TOKENIZERS))}; or leave vocab_file out and give "
            "tokenizer.path, a tokenizer.json or .model"
        )
    merges = values.get("merge_file")
    if merges and kind == "GPT2BPETokenizer" and Path(merges) not in merge_files(vocab):
        places = " or ".join(map(str, merge_files(vocab)))
        raise NeoxError(f"merge_file={merges!r}: the merges of vocab_file are looked for in {places}; lay them there")
    return {"tokenizer.path": str(vocab)}


def _data(values: Tree) -> Tree:
    """GPT-NeoX's order. Of a set for training all is trained on, and nothing is left to validate."""
    found: Tree = {}
    if describes_a_model(values) or values.keys() & {"data_path", "train_data_paths"}:
        found = {"data.order": "neox"}
    if "train_data_paths" in values:
        paths = values["train_data_paths"]
        paths = [paths] if isinstance(paths, str) else paths
        if len(paths) != 1:
            raise NeoxError(f"train_data_paths names {len(paths)} sets: write them as data.blend, each with its weight")
        whole = {"data.split": [1.0, 0.0, 0.0], "train.eval_every": 0, "data.epoch_margin": _MARGIN}
        return found | {"data.path": paths[0], **whole}
    return found | ({"train.eval_every": values["eval_interval"]} if "eval_interval" in values else {})


def _seed(values: Tree) -> Tree:
    """One seed for the weights and for the order of the data."""
    return {"train.seed": values["seed"], "data.seed": values["seed"]} if "seed" in values else {}


def _check_rest(values: Tree) -> None:
    if values.get("zero_optimization", {}).get("cpu_offload"):
        raise NeoxError("zero_optimization.cpu_offload=True is refused: the optimizer state stays on the device")
    if "load" in values and not values.get("finetune") and values["load"] != values.get("save"):
        raise NeoxError(
            f"load={values['load']!r}: GPT-NeoX's own checkpoints are converted first (`megatron_sep convert`) "
            "and given as checkpoint.init_from; a run goes on from its own dir by itself"
        )


COMPOSERS = (
    neox_attention.attention,
    neox_position.position,
    neox_position.softmax,
    neox_model.mlp,
    neox_model.norms,
    neox_model.biases,
    _batch,
    _precision,
    _optimizer,
    _tokenizer,
    _data,
    _seed,
    _rest,
)
REMARKS = (neox_attention.remarks, neox_position.remarks, neox_model.remarks)
"""What a user may want to know of a configuration that was taken over."""

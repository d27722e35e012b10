"""`convert SRC DST`: Hugging Face and GPT-NeoX in, this program's own checkpoint out; and the other way round.

Everything is checked before a byte is written; the result is written aside, one layer at a time, and renamed. A
checkpoint that holds weights alone is one safetensors file a layer beside the manifest of every checkpoint.
"""

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sep.config import RunConfig, sketch_config
from megatron_sep.config.schema import ModelConfig
from megatron_sep.convert.model_card import model_card
from megatron_sep.data.tokenizer import copy_tokenizer, load_tokenizer
from megatron_sep.errors import UserError
from megatron_sep.files import written_aside
from megatron_sep.weights.export import export_rules
from megatron_sep.weights.hugging_face import make_config
from megatron_sep.weights.open_source import WEIGHTS, OpenedSource, open_source
from megatron_sep.weights.sealed import Description, TrainState, records_of, write_manifest

_PRECISION = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
Spelling = Callable[[dict[str, Tensor]], dict[str, Tensor]]
_SHAPE = {"model.num_layers", "model.hidden_size", "model.num_attention_heads"}
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


class ConvertError(UserError):
    """A conversion that cannot be done as asked."""


def convert(src: Path, dst: Path, config: Path | None = None) -> OpenedSource:
    """Write ``src`` as a new directory: a checkpoint of ours becomes Hugging Face's, all else a checkpoint of ours."""
    if dst.exists():
        raise ConvertError(f"{dst}: is there already; name a new directory, or remove it")
    source = open_source(src, _described(config) if config else None)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(dst) as partial:
        partial.mkdir()
        (_write_hugging_face if source.own else _write_own)(source, partial, dst)
    return source


def _described(path: Path) -> ModelConfig:
    """The model that a YAML describes; data, tokenizer and what else training needs may be missing there."""
    sketch = sketch_config(path)
    unknown = [f"{place} ({key})" for place, key in sketch.missing.items() if place in _SHAPE]
    if unknown:
        raise ConvertError(f"{path}: does not say {', '.join(unknown)}; weights cannot be read without")
    return sketch.config.model


def _write_own(source: OpenedSource, partial: Path, dst: Path) -> None:
    dtype = _write_groups(source, partial, WEIGHTS, lambda group: group)
    _copy_tokenizer(source, partial)
    names = [name for name in _TOKENIZER if (partial / name).is_file()]
    run = RunConfig.model_validate(
        {
            "dir": str(dst),
            "model": source.config.model_dump(),
            "attention": source.attention.model_dump(),
            "tokenizer": {"path": str(dst / names[0]) if names else "none", "eod": source.eod},
            "data": {"path": "none"},
            "train": {"precision": _PRECISION[dtype]},
        }
    )
    description = Description(TrainState(), run, source.vocab_size, engine="weights")
    write_manifest(partial, description.record(ranks=1), records_of(partial))


def _write_hugging_face(source: OpenedSource, partial: Path, _: Path) -> None:
    rules = export_rules(source)
    make_config(source.config, source.vocab_size, rules, "float32", None)  # raises before anything is written
    count = len(source.groups)
    links = {link.ours: link for group in source.groups for link in group}

    def spelled(group: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: part
            for ours, whole in group.items()
            for name, part in zip(links[ours].theirs, links[ours].split(whole, source.config), strict=True)
        }

    dtype = _write_groups(source, partial, f"model-{{:05d}}-of-{count:05d}.safetensors", spelled)
    _copy_tokenizer(source, partial)
    eod = load_tokenizer(source.tokenizer, source.eod).eod_id if source.tokenizer else None
    _write_json(partial / "config.json", make_config(source.config, source.vocab_size, rules, str(dtype)[6:], eod))
    _write_index(partial)
    package = resources.files("megatron_sep")
    (partial / "modeling_sep.py").write_text((package / "convert" / "modeling_sep.py").read_text())
    (partial / "sep_cache.py").write_text((package / "convert" / "sep_cache.py").read_text())
    (partial / "sep_pattern.py").write_text((package / "attention" / "pattern.py").read_text())
    (partial / "README.md").write_text(model_card(source, rules, eod), encoding="utf-8")
    for path in partial.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone, and a tokenizer brings the mode that it had


def _write_groups(source: OpenedSource, folder: Path, name: str, spelled: Spelling) -> torch.dtype:
    """One file a group, one group in memory; returns the dtype they have in common."""
    dtypes: set[torch.dtype] = set()
    for number, group in enumerate(source, 1):
        dtypes |= {tensor.dtype for tensor in group.values()}
        _write_group(spelled(group), folder / name.format(number))
        group.clear()  # or it would be there until the next one is whole
    if len(dtypes) != 1 or not dtypes <= _PRECISION.keys():
        raise ConvertError(f"{source.place}: weights of {', '.join(map(str, dtypes))}; known: fp32, fp16, bf16")
    return dtypes.pop()


def _write_group(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _copy_tokenizer(source: OpenedSource, folder: Path) -> None:
    if source.tokenizer is None:
        return
    beside = source.tokenizer.parent
    copy_tokenizer(source.tokenizer, folder / f"tokenizer{source.tokenizer.suffix}")
    for name in _TOKENIZER[2:]:
        if (beside / name).is_file():
            shutil.copy(beside / name, folder / name)
    if source.tokenizer.suffix == ".json" and not (folder / "tokenizer_config.json").exists():
        tokenizer = load_tokenizer(source.tokenizer, source.eod)
        end = tokenizer.decode([tokenizer.eod_id])
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
        _write_json(folder / "tokenizer_config.json", settings)


def _write_index(folder: Path) -> None:
    from safetensors import safe_open

    where: dict[str, str] = {}
    size = 0
    for path in sorted(folder.glob("model-*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path.name)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

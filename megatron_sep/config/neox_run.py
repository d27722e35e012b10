"""A run directory of GPT-NeoX as the configuration of a run that goes on from it."""

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_sep.config.load import ConfigError, load_config, read_tree
from megatron_sep.config.neox import spell
from megatron_sep.config.neox_rules import Tree
from megatron_sep.config.schema import RunConfig

_TAG = re.compile(r"global_step(\d+)")
_ITS_OWN = {"load", "finetune", "iteration"}
"""What a run said of where it began."""


def neox_run(folder: Path, words: Sequence[str]) -> RunConfig:
    """From the YAML that lies in a checkpoint: its weights, optimizer and step, and ``words`` on top of all that.

    ``folder`` is a run's, whose `latest` names the checkpoint, or a checkpoint's own. Raises ConfigError.
    """
    checkpoint = _checkpoint(folder)
    found = _TAG.fullmatch(checkpoint.name)
    if found is None:
        raise ConfigError(f"{checkpoint}: the name of a checkpoint of GPT-NeoX is global_step and its step")
    given = [Path(word) for word in words if "=" not in word and word.endswith((".yml", ".yaml"))]
    files = sorted((checkpoint / "configs").glob("*.y*ml")) or given
    if not files:
        raise ConfigError(f"{checkpoint}: has no configs/*.yml; name the run's YAML files beside --from-neox")
    if not any(word.startswith("dir=") for word in words):
        raise ConfigError(f"--from-neox {folder}: pass dir=..., where the run goes on; {folder} stays as it is")
    taken = [f"checkpoint.init_from={checkpoint}", f"checkpoint.init_step={found[1]}", "checkpoint.init_optimizer=true"]
    more = [word for word in words if files != given or Path(word) not in given]
    batch = _global_batch(checkpoint, files)
    words = [*map(str, files[1:]), *taken, *batch, *more]
    return load_config(files[0], words, lambda tree: {k: v for k, v in tree.items() if spell(str(k)) not in _ITS_OWN})


def _checkpoint(folder: Path) -> Path:
    """The folder that `latest` names, or the folder itself where it is a checkpoint."""
    if _TAG.fullmatch(folder.name) and folder.is_dir():
        return folder
    latest = folder / "latest"
    try:
        tag = latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{latest}: cannot be read: {error}; name a checkpoint, {folder}/global_stepN") from error
    if not (folder / tag).is_dir():
        raise ConfigError(f"{latest}: names {tag!r}, and {folder / tag} is no directory; name another checkpoint")
    return folder / tag


def _global_batch(checkpoint: Path, files: Sequence[Path]) -> list[str]:
    """The global batch of the run as it was, whatever the number of ranks now: one optimizer file a rank tells it."""
    values: Tree = {spell(str(key)): value for path in files for key, value in read_tree(path).items()}
    ranks = len({path.name for path in checkpoint.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")})
    micro = values.get("train_micro_batch_size_per_gpu", values.get("batch_size"))
    if values.get("train_batch_size") is not None or not ranks or micro is None:
        return []
    steps = values.get("gradient_accumulation_steps") or values.get("gas") or 1
    return [f"train.global_batch_size={micro * steps * ranks}"]

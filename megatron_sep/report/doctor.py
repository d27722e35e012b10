"""What is installed, what a run would compute with, and whether it fits: in words, before it starts."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil
import torch

from megatron_sep.config import RunConfig
from megatron_sep.config.needs import Needs
from megatron_sep.data.resolved import resolve
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.operation import Operation
from megatron_sep.model.build import DTYPES
from megatron_sep.model.operations import operations_table, training_call
from megatron_sep.parallel.device import current_device

PACKAGES = {
    "megatron-core": ("megatron.core", "pip install megatron_sep"),
    "numpy": ("numpy", "pip install megatron_sep"),
    "Triton": ("triton", "comes with torch for CUDA; Sep-Attention's fused kernel needs it"),
    "Transformer Engine": ("transformer_engine.pytorch", "optional; build it from NVIDIA's source or wheel"),
    "apex": ("apex.optimizers", "optional; build it from NVIDIA/apex, PyPI's apex is another project"),
    "DeepSpeed": ("deepspeed", "pip install megatron_sep[deepspeed]; for parallel.engine: deepspeed"),
    "transformers": ("transformers", "pip install megatron_sep[hf]; for convert and generate"),
    "safetensors": ("safetensors", "pip install megatron_sep[hf]; for weights of others"),
    "pyarrow": ("pyarrow", "pip install megatron_sep[data]; for Parquet and Arrow"),
    "zstandard": ("zstandard", "pip install megatron_sep[data]; for .zst"),
    "sentencepiece": ("sentencepiece", "pip install megatron_sep[sentencepiece]; for .model tokenizers"),
    "matplotlib": ("matplotlib", "pip install megatron_sep[plot]; for plot and mask"),
    "wandb": ("wandb", "pip install megatron_sep[log]; for metrics.wandb"),
    "TensorBoard": ("tensorboard", "pip install megatron_sep[log]; for metrics.tensorboard"),
}
"""What it is called, the module that must be importable, and where it comes from."""
TOOLS = {
    "C compiler": (("CC", "cc", "gcc", "clang"), "Triton builds its launchers with it"),
    "C++ compiler": (("CXX", "c++", "g++", "clang++"), "torch.compile needs it on the CPU"),
    "nvcc": (("CUDA_NVCC", "nvcc"), "only to build Transformer Engine or apex"),
}
"""Environment variable and names of programs, and who needs them."""
_GB = 1e9
_SPARE = 0.9
"""Share of a device that a run can fill."""


def doctor(config: RunConfig | None) -> Iterator[str]:
    """One line a finding; those that stand in a run's way begin with `!`. Raises what ``resolve`` raises."""
    yield from _machine()
    yield from _packages()
    yield from _tools()
    call = _call(config)
    yield f"operations on {call.device} in {str(call.dtype).removeprefix('torch.')}"
    for operation in operations_table().values():
        yield from _rows(operation, call)
    if config is not None:
        yield from _needs(config)


def _machine() -> Iterator[str]:
    yield f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs, {platform.system()}"
    if not torch.cuda.is_available():
        built = "no CUDA in this torch" if torch.version.cuda is None else f"no GPU found by CUDA {torch.version.cuda}"
        yield f"GPU: none ({built}); training runs on the CPU over gloo"
        return
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        capability = f"{found.major}.{found.minor}"
        yield f"GPU {number}: {found.name}, {found.total_memory / _GB:.0f} GB, compute capability {capability}"
    if not torch.distributed.is_nccl_available():
        yield "! NCCL: not in this torch; several GPUs cannot train together"
        return
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    yield f"NCCL: {'.'.join(map(str, version))}"


def _packages() -> Iterator[str]:
    made_by = metadata.packages_distributions()  # reads the list of files of all that is installed
    for name, (module, source) in PACKAGES.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            yield f"{name}: not installed ({error}); {source}"
        except Exception as error:  # a broken installation fails in its own ways
            yield f"{name}: is installed and cannot be imported ({error!r}); {source}"
        else:
            yield f"{name}: {_version(module, made_by)}"


def _version(module: str, made_by: Mapping[str, list[str]]) -> str:
    top = module.partition(".")[0]
    names = made_by.get(top, [top]) if top != "megatron" else ["megatron-core"]
    try:
        return metadata.version(names[0])
    except metadata.PackageNotFoundError:
        return "found, of an unknown version"


def _tools() -> Iterator[str]:
    for name, ((variable, *programs), purpose) in TOOLS.items():
        wanted = (os.environ.get(variable), *programs)
        found = next(filter(None, (shutil.which(program) for program in wanted if program)), None)
        yield f"{name}: {found}" if found else f"{name}: none of {', '.join(programs)} in PATH; {purpose}"


def _call(config: RunConfig | None) -> Call:
    """What a model of the configuration will compute."""
    device = current_device()
    if config is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return Call.on(device, dtype, head_size=64, training=True)
    return training_call(config.model, device, DTYPES[config.train.precision], config.parallel.tensor)


def _rows(operation: Operation, call: Call) -> Iterator[str]:
    """What auto takes, then every row with what stands in its way."""
    taken = operation.automatic(call)
    yield f"  {operation.name}: {taken.name}" if taken else f"! {operation.name}: nothing takes such a call by itself"
    for row in operation.implementations:
        if row is not taken:
            yield f"    {row.name}: {row.why_not(call) or 'can; taken by name, or after those above it'}"


def _needs(config: RunConfig) -> Iterator[str]:
    """Memory and disk against what is free, for as many processes as this machine has devices."""
    vocab_size = resolve(config.tokenizer, config.model, config.attention).vocab_size
    parallel = config.parallel
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = int(os.environ.get("WORLD_SIZE", max(gpus, 1)))
    ranks = max(ranks, parallel.tensor * parallel.pipeline * parallel.context)
    needs = Needs(config, vocab_size, ranks)
    free, where = _free_memory()
    parts = f"weights, gradients and optimizer {_gb(needs.state_bytes)}, activations {_gb(needs.activation_bytes)}"
    yield f"memory of a process, of {ranks} in all: about {_gb(needs.device_bytes)} ({parts})"
    fits = needs.device_bytes * (1 if gpus else ranks) <= free * _SPARE
    way_out = "" if fits else "; lower train.micro_batch_size, set train.recompute, or split more under parallel"
    yield f"{'  ' if fits else '! '}{_gb(free)} are free {where}{way_out}"
    place = next(folder for folder in (config.dir.resolve(), *config.dir.resolve().parents) if folder.exists())
    yield from _disk(needs, place)


def _gb(count: int) -> str:
    return f"{count / _GB:.2f} GB"


def _free_memory() -> tuple[int, str]:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "on this GPU"
    return int(psutil.virtual_memory().available), "in this machine, for all of its processes"


def _disk(needs: Needs, place: Path) -> Iterator[str]:
    keep, free = needs.config.checkpoint.keep, shutil.disk_usage(place).free
    kept = f"the newest {keep}" if keep else f"one every {needs.config.checkpoint.every} steps, all kept,"
    yield f"checkpoints: {_gb(needs.checkpoint_bytes)} each; {kept} and one being written take {_gb(needs.disk_bytes)}"
    fits = needs.disk_bytes <= free
    way_out = "" if fits else "; set checkpoint.keep, or a dir on another disk"
    yield f"{'  ' if fits else '! '}{_gb(free)} are free at {place}{way_out}"
    if not os.access(place, os.W_OK):
        yield f"! {place}: cannot be written to; set another dir"

"""Verbs that train."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_sep.data.extras import needs_extra
from megatron_sep.verbs.app import Overrides, app

if TYPE_CHECKING:
    from megatron_sep.config import RunConfig
    from megatron_sep.train.exports import Exporter


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="YAML of the run, or of GPT-NeoX or SepLLM, or the name of a shipped one", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="go on though this setting, or section, is not as it was; may be given again"),
    ] = None,
    from_neox: Annotated[
        Path | None,
        typer.Option(help="go on from GPT-NeoX's run directory, with the YAML in its checkpoint; needs dir=..."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="train every combination of section.key=value,value, each in a dir of its own below the run's; may be "
            "given again, and settings behind it may have several values too"
        ),
    ] = None,
    print_jobs: Annotated[bool, typer.Option("--print", help="with --grid: print the commands instead")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="with --grid: print a SLURM array's script instead")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="no header and no status lines, as metrics.console=off; metrics.jsonl has all"),
    ] = False,
) -> None:
    """Train a model, or go on from the newest complete checkpoint of the run's dir."""
    if quiet:
        overrides = [*(overrides or []), "metrics.console=off"]
    if grid or print_jobs or slurm:
        from megatron_sep.report.grid import Wish, train_grid

        wish = Wish(config, tuple(grid or ()), tuple(overrides or ()), tuple(allow_change or ()), from_neox is not None)
        raise typer.Exit(train_grid(wish, print_jobs, slurm))
    _train(_run_config(config, overrides or [], from_neox), allow_change or ())


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Make a corpus from the sources of transformers and train a small SepLLM model on it, in minutes on a CPU.

    It is the shipped run `quickstart`: corpus and checkpoints go to runs/quickstart in the working directory.
    """
    from megatron_sep.config import ConfigError, load_config

    run_config = load_config(Path("quickstart"), overrides or ())
    if run_config.data.path is None or "RANK" in os.environ:
        raise ConfigError(
            "quickstart: makes the corpus that data.path names, in one process; for other data or several processes "
            "use `train quickstart`"
        )
    from megatron_sep.prepare.quickstart import make_corpus

    make_corpus(run_config.data.path.parent)
    _train(run_config)


def _run_config(config: Path | None, overrides: list[str], from_neox: Path | None) -> "RunConfig":
    """Of a YAML file, or of what GPT-NeoX left of a run."""
    from megatron_sep.config import ConfigError, load_config
    from megatron_sep.config.neox_run import neox_run

    if from_neox is not None:
        return neox_run(from_neox, [*([] if config is None else [str(config)]), *overrides])
    if config is None:
        raise ConfigError("train: name the YAML of a run, or --from-neox with GPT-NeoX's run directory")
    return load_config(config, overrides)


def _train(run_config: "RunConfig", allow_change: Sequence[str] = ()) -> None:
    """Of this process's part in the job."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process is told by this program, without its stacks
    from megatron_sep.parallel.groups import process_groups
    from megatron_sep.train.signals import heard_signals

    parallel, seed, job = run_config.parallel, run_config.train.seed, str(run_config.dir)
    with heard_signals() as signals, process_groups(parallel, seed, job) as topology:
        from megatron_sep.train.imports import imports_kept
        from megatron_sep.train.loop import train as train_loop
        from megatron_sep.train.run import build_run
        from megatron_sep.train.run_lock import run_lock

        with run_lock(run_config.dir, topology), imports_kept():
            train_loop(build_run(run_config, topology, allow_change, signals, _exporter(run_config)))


def _exporter(config: "RunConfig") -> "Exporter | None":
    """What `convert` uses, where the run asks for exports."""
    if config.checkpoint.export_every is None:
        return None
    with needs_extra("safetensors", "hf"):
        import safetensors.torch  # noqa: F401  # missing, it would be missed at the first export

        from megatron_sep.convert.convert import convert as export
    return export

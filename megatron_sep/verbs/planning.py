"""Verbs that look ahead: at a configuration, at its cost, and at the machine."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.verbs.app import Overrides, RunPath, app


@app.command()
def show(
    config: RunPath,
    overrides: Overrides = None,
    as_neox: Annotated[bool, typer.Option("--as-neox", help="print the keys of GPT-NeoX and SepLLM instead")] = False,
) -> None:
    """Print the resolved configuration, the parameter count and the pattern of each layer, and what is missing."""
    from megatron_sep.config import sketch_config
    from megatron_sep.config.load import neox_notes, neox_yaml
    from megatron_sep.report.describe import describe

    if as_neox:
        typer.echo(neox_yaml(sketch_config(config, overrides or ())))
        return
    typer.echo(describe(sketch_config(config, overrides or ())))
    for note in neox_notes(config, overrides or ()):
        typer.echo(f"# {note}")


@app.command()
def plan(
    config: RunPath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="GPUs of the job")] = 1,
    gpu: Annotated[str, typer.Option(help="their kind: h100, h200, a100, b200 or l40s")] = "h100",
    price: Annotated[float | None, typer.Option(help="of a GPU for an hour, in your currency")] = None,
    separator_share: Annotated[
        float, typer.Option(help="share of the tokens that are separators; training logs the data's own")
    ] = 0.15,
) -> None:
    """Estimate memory, time, cost, cache and disk of a run, and which layouts fit; no torch, no GPU and no data needed.

    A line with ! is in the run's way (exit code 1).
    """
    from megatron_sep.config import sketch_config
    from megatron_sep.report.plan import Machines
    from megatron_sep.report.plan import plan as lines_of

    lines = list(
        lines_of(
            sketch_config(config, [*(overrides or ()), "dir=runs/planned"]), Machines(gpus, gpu, price, separator_share)
        )
    )
    for line in lines:
        typer.echo(line)
    raise typer.Exit(any(line.startswith("!") for line in lines))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML of a run that is to fit", show_default=False)] = None,
    overrides: Overrides = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="measure instead each rank of the job that this is started in")
    ] = False,
) -> None:
    """Say what is installed, what computes a run, and whether it fits; a line with ! is in its way (exit code 1)."""
    from megatron_sep.config import load_config

    run_config = None if config is None else load_config(config, overrides or ())
    warnings.simplefilter("ignore")  # of what libraries do not find; the lines below say it
    from megatron_sep.report.doctor import doctor as examine_machine

    if distributed:
        from megatron_sep.config.schema import ParallelConfig
        from megatron_sep.parallel.groups import process_groups

        with process_groups(run_config.parallel if run_config else ParallelConfig()) as topology:
            from megatron_sep.report.doctor_ranks import examine

            for line in examine(topology):
                topology.say(line)
        return
    lines = []
    for line in examine_machine(run_config):
        typer.echo(line)
        lines.append(line)
    raise typer.Exit(any(line.startswith("!") for line in lines))

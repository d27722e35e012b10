"""The verbs: parse, load the configuration, call one function each. Heavy imports live inside the verb."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of the run", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a model, or go on from the newest complete checkpoint of the run's dir."""
    from megatron_sep.config import load_config

    run_config = load_config(config, overrides or ())
    from megatron_sep.parallel.groups import process_groups

    with process_groups(run_config.parallel, run_config.train.seed):
        from megatron_sep.train.loop import train as train_loop
        from megatron_sep.train.run import build_run

        train_loop(build_run(run_config))


@app.command()
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration, the parameter count and the pattern of each layer."""
    from megatron_sep.config import load_config
    from megatron_sep.report.describe import describe

    typer.echo(describe(load_config(config, overrides or ())))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, or the dir of a run")],
    prompt: Annotated[str, typer.Option(help="text to continue")],
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Continue a text from a trained model."""
    from megatron_sep.config.schema import ParallelConfig
    from megatron_sep.parallel.groups import process_groups

    with process_groups(ParallelConfig(), seed):
        from megatron_sep.generate.sampler import Generator, Sampling

        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
        pieces = Generator.from_checkpoint(checkpoint).stream(prompt, sampling)
        typer.echo(prompt + next(pieces, ""), nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


@app.command()
def plot(
    run_dirs: Annotated[list[Path], typer.Argument(help="dirs of runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("loss.png"),
) -> None:
    """Draw the train and validation loss of runs."""
    from megatron_sep.report.curves import plot_losses

    plot_losses(run_dirs, out)
    typer.echo(f"wrote {out}")


def main() -> None:
    """Run a verb; a mistake of the user's is one message and exit code 2, anything else a traceback."""
    try:
        app()
    except Exception as error:
        if type(error).__module__.startswith("megatron_sep."):
            sys.exit(f"error: {error}")
        raise

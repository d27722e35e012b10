"""Verbs about what runs have left, and about the paper."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.data.extras import needs_extra
from megatron_sep.verbs.app import Overrides, RunPath, app


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="folder with runs in it or below it", metavar="[DIR]")] = Path("runs"),
) -> None:
    """List runs: running, done, stopped, failed or killed; step, losses, time left, and the settings that differ."""
    from megatron_sep.report.runs import list_runs, table

    for line in table(list_runs(folder)):
        typer.echo(line)


@app.command()
def watch(
    runs: Annotated[
        list[Path], typer.Argument(help="dirs of runs, or folders that have them, now or later", show_default=False)
    ],
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="of the page; 8700, or any free one, by default", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; the default is reached from here alone")] = (
        "127.0.0.1"
    ),
) -> None:
    """Show a page that follows runs while they train: losses, rates, attention, faults; zoom, smooth, export."""
    from megatron_sep.report.watch import watch as serve

    for line in serve(runs, host, port):
        typer.echo(line)


@app.command()
def plot(
    run_dirs: Annotated[list[Path], typer.Argument(help="dirs of runs, as dir in their YAML", show_default=False)],
    out: Annotated[Path, typer.Option(help="picture to write: .png, .jpg, .svg or .pdf")] = Path("loss.png"),
    figures: Annotated[
        Path | None, typer.Option(help="instead: folder for every figure of `watch`, as PNG and SVG")
    ] = None,
    against: Annotated[str, typer.Option(help="step, tokens, seconds or flops")] = "step",
    smooth: Annotated[int, typer.Option(min=0, help="lines on either side to average each one with")] = 0,
) -> None:
    """Draw the train and validation loss of runs, and how far they are above the first; or all of their figures."""
    from megatron_sep.report.curves import Axis, plot_figures, plot_losses

    axis = Axis(against, smooth)
    if figures is None:
        plot_losses(run_dirs, out, axis)
    for path in [out] if figures is None else plot_figures(run_dirs, figures, axis):
        typer.echo(f"wrote {path}")


@app.command()
def mask(
    config: RunPath,
    overrides: Overrides = None,
    text: Annotated[
        str, typer.Option(help="text to show it on, of at most 300 tokens")
    ] = "Cats sleep, dogs run. Birds sing; fish?",
    out: Annotated[Path, typer.Option(help="picture to write: .png, .jpg, .svg or .pdf")] = Path("mask.png"),
) -> None:
    """Draw which tokens each token of a text sees, for every kind of layer."""
    from megatron_sep.config import load_config
    from megatron_sep.report.attention_map import plot_masks

    plot_masks(load_config(config, overrides or ()), text, out)
    typer.echo(f"wrote {out}")


@app.command()
def reproduce(
    items: Annotated[
        list[str] | None,
        typer.Argument(help="table1 ... table17, figure1 ... figure14, or exact: all of that kind", show_default=False),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="print every item, its kind and what it needs")] = False,
    runs: Annotated[Path | None, typer.Option(help="folder with dirs of runs in it or below it")] = None,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(help="a checkpoint, a run's dir or a Hugging Face directory; may be given again"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="file, or folder of *.txt, to feed to models (tables 4 to 8 and 16)")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="of that text")] = 20_000,
    streams: Annotated[
        int, typer.Option(min=1, help="cut that text into so many parts that are read side by side (tables 4 to 8)")
    ] = 1,
    out: Annotated[Path, typer.Option(help="folder for Markdown, JSON and pictures")] = Path("reports"),
) -> None:
    """Make tables and figures of the paper anew: ours beside theirs, and why they differ."""
    from megatron_sep.reproduce.item import Inputs, ReproduceError
    from megatron_sep.reproduce.items import chosen, listing
    from megatron_sep.reproduce.write import to_markdown, write

    if show:
        typer.echo(listing())
        return
    if not items:
        raise ReproduceError("reproduce: name items, such as table3, or exact; --list has them all")
    with needs_extra("transformers", "hf"), needs_extra("safetensors", "hf"):
        for item, make in chosen(items):
            result = make(Inputs(runs, tuple(checkpoint or ()), text, tokens, streams, out))
            typer.echo(to_markdown(item, result))
            typer.echo(f"wrote {', '.join(map(str, write(item, result, out)))}", err=True)

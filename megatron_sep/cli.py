"""The verbs: parse, load the configuration, call one function each. Heavy imports live inside the verb."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.errors import SepError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

pile = typer.Typer(no_args_is_help=True, help="The Pile as it is published: check, join or cut its parts.")
app.add_typer(pile, name="pile")

ConfigPath = Annotated[Path, typer.Argument(help="YAML of the run, or of GPT-NeoX or SepLLM", show_default=False)]
ShardPrefix = Annotated[Path, typer.Argument(help="path without .idx and .bin", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ... and more files", show_default=False)]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(help="go on though this setting, or section, is not as it was; may be given again"),
    ] = None,
) -> None:
    """Train a model, or go on from the newest complete checkpoint of the run's dir."""
    from megatron_sep.config import load_config

    run_config = load_config(config, overrides or ())
    from megatron_sep.parallel.groups import process_groups

    with process_groups(run_config.parallel, run_config.train.seed) as topology:
        from megatron_sep.train.loop import train as train_loop
        from megatron_sep.train.run import build_run
        from megatron_sep.train.run_lock import run_lock

        with run_lock(run_config.dir, topology):
            train_loop(build_run(run_config, topology, allow_change or ()))


@app.command()
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration, the parameter count and the pattern of each layer."""
    from megatron_sep.config import load_config
    from megatron_sep.config.load import neox_notes
    from megatron_sep.report.describe import describe

    typer.echo(describe(load_config(config, overrides or ())))
    for note in neox_notes(config, overrides or ()):
        typer.echo(f"# {note}")


@app.command()
def prepare(config: ConfigPath, overrides: Overrides = None) -> None:
    """Turn text into a shard of tokens and its manifest, or go on where a killed preparation stopped."""
    from megatron_sep.config.load import load
    from megatron_sep.config.prepare import PrepareConfig

    prepare_config = load(PrepareConfig, config, overrides or ())
    from megatron_sep.prepare.prepare import prepare as make
    from megatron_sep.prepare.receipt import summary

    typer.echo(summary(prepare_config.output, make(prepare_config)))


@app.command()
def batch(
    config: ConfigPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="training step, from 1")] = 1,
    rows: Annotated[list[int] | None, typer.Option("--row", help="sequence of the global batch, from 0")] = None,
    position: Annotated[int | None, typer.Option(help="show what this token sees")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what was in a training step: documents, text, and what each layer's pattern lets a token see."""
    from megatron_sep.config import load_config

    run_config = load_config(config, overrides or ())
    from megatron_sep.report.batch import to_json, to_text, view_step

    views = view_step(run_config, step, rows or [0])
    if as_json:
        typer.echo(to_json(views, position))
        return
    from rich.console import Console

    for view in views:
        Console(soft_wrap=True).print(to_text(view, position))


@pile.command()
def verify(
    prefix: ShardPrefix,
    checksums: Annotated[Path | None, typer.Option(help="file as `sha256sum` writes it")] = None,
) -> None:
    """Read every file of a set once, and hold it against its checksums and its index."""
    from megatron_sep.data import pile as sets

    report = sets.verify(prefix, checksums)
    typer.echo(sets.summary(report))
    raise typer.Exit(1 if report.wrong else 0)


@pile.command()
def join(prefix: ShardPrefix, output: Annotated[Path, typer.Argument(help="prefix of the joined files")]) -> None:
    """Write the parts of a set as one file, for other programs; training reads the parts where they lie."""
    from megatron_sep.data import pile as sets

    typer.echo(f"{sets.join(prefix, output)}  {output}.bin")


@pile.command()
def split(
    prefix: ShardPrefix,
    output: Annotated[Path, typer.Argument(help="prefix of the parts")],
    part_bytes: Annotated[int, typer.Option(help="size of a part")] = 5_000_000_000,
) -> None:
    """Cut a joined set into parts, as the Pile is published."""
    from megatron_sep.data import pile as sets

    for part in sets.split(prefix, output, part_bytes):
        typer.echo(part)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(help="Hugging Face or GPT-NeoX directory, a checkpoint, or a run's dir")],
    dst: Annotated[Path, typer.Argument(help="new directory: Hugging Face where SRC is ours, else ours")],
    config: Annotated[Path | None, typer.Option(help="YAML with the model of SRC; GPT-NeoX's layers need it")] = None,
    check: Annotated[bool, typer.Option("--check", help="compare the logits of both on the same text")] = False,
) -> None:
    """Convert weights: Hugging Face's GPTNeoX and Llama and GPT-NeoX's layers to a checkpoint of ours, and back."""
    from megatron_sep.convert.convert import convert as make

    source = make(src, dst, config)
    typer.echo(f"wrote {dst}: {source.config.num_layers} layers, vocabulary {source.vocab_size:,}")
    if check:
        from megatron_sep.config.schema import ParallelConfig
        from megatron_sep.parallel.groups import process_groups

        with process_groups(ParallelConfig()) as topology:
            from megatron_sep.convert.check import differences

            typer.echo(str(differences(source, dst, topology)))


@app.command()
def separators(
    tokenizer: Annotated[Path, typer.Argument(help="tokenizer.json or sentencepiece .model")],
    text: Annotated[Path | None, typer.Option(help="text to measure them on")] = None,
    merged: Annotated[bool, typer.Option("--merged", help='add merged tokens such as ." and newline runs')] = False,
    add: Annotated[list[int] | None, typer.Option("--id", help="add this token id")] = None,
) -> None:
    """List which tokens of a tokenizer are separators and, on a text, how dense they are and what they miss."""
    from megatron_sep.report.separators import describe_separators

    typer.echo(describe_separators(tokenizer, text, merged, tuple(add or ())))


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="a checkpoint, the dir of a run, or a Hugging Face directory")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; may be given again")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt a line, all in one batch")] = None,
    attention: Annotated[Path | None, typer.Option(help="YAML with another pattern than the model's own")] = None,
    streaming: Annotated[str | None, typer.Option(help="cache of bounded size: a,s,w,c as 4,64,256,800")] = None,
    positions: Annotated[str, typer.Option(help="of a bounded cache: cache, text or frozen")] = "cache",
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
) -> None:
    """Continue texts with a model whose cache keeps only what its pattern sees."""
    from megatron_sep.generate.sampler import Sampling
    from megatron_sep.generate.session import open_session

    sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
    session = open_session(checkpoint, attention, streaming, positions)
    for text in session.shown(session.prompts(prompt or (), prompts), sampling):
        typer.echo(text, nl=False)
        sys.stdout.flush()
    typer.echo(session.cache_lines(), err=True)


@app.command()
def plot(
    run_dirs: Annotated[list[Path], typer.Argument(help="dirs of runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("loss.png"),
) -> None:
    """Draw the train and validation loss of runs."""
    from megatron_sep.report.curves import plot_losses

    plot_losses(run_dirs, out)
    typer.echo(f"wrote {out}")


@app.command()
def mask(
    config: ConfigPath,
    overrides: Overrides = None,
    text: Annotated[str, typer.Option(help="text to show it on")] = "Cats sleep, dogs run. Birds sing; fish?",
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("mask.png"),
) -> None:
    """Draw which tokens each token of a text sees, for every kind of layer."""
    from megatron_sep.config import load_config
    from megatron_sep.report.attention_map import plot_masks

    plot_masks(load_config(config, overrides or ()), text, out)
    typer.echo(f"wrote {out}")


def main() -> None:
    """Run a verb: a mistake of the user's is one message and exit code 2, a failure of the run one and exit code 1."""
    try:
        app()
    except SepError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

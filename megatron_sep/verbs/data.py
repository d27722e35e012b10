"""Verbs about text, its tokens, and what training reads of them."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.errors import UserError
from megatron_sep.verbs.app import Overrides, RunPath, app

PreparePath = Annotated[Path, typer.Argument(help="YAML of what to prepare; docs/data.md has one", show_default=False)]
Settings = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]


@app.command()
def prepare(
    config: PreparePath,
    overrides: Settings = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/N: do what part i of N, from 1, can do by itself; `merge` does the rest", show_default=False
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="ray, or ray://ADDRESS of the head: share the work among a Ray cluster", show_default=False),
    ] = None,
) -> None:
    """Turn text into a shard of tokens and its manifest, or go on where a killed preparation stopped."""
    from megatron_sep.config.load import load
    from megatron_sep.config.prepare import PrepareConfig

    prepare_config = load(PrepareConfig, config, overrides or ())
    if part is not None and on is not None:
        raise UserError(f"--part {part} --on {on}: a cluster works on all parts; give one of the two")
    if part is not None:
        from megatron_sep.prepare.jobs import read_part, work_on

        typer.echo(work_on(prepare_config, *read_part(part)))
        return
    from megatron_sep.prepare.prepare import prepare as make
    from megatron_sep.prepare.receipt import summary

    if on is not None:
        from megatron_sep.prepare.on_ray import prepare_on

        typer.echo(summary(prepare_config.output, prepare_on(prepare_config, _ray_address(on))))
        return
    typer.echo(summary(prepare_config.output, make(prepare_config)))


def _ray_address(on: str) -> str | None:
    scheme, _, address = on.partition("://")
    if scheme != "ray" or on == "ray://":
        raise UserError(f"--on {on}: is no cluster that is known; give ray, or ray://ADDRESS of its head")
    return address or None


@app.command()
def merge(config: PreparePath, overrides: Settings = None) -> None:
    """Do what needs all parts of `prepare --part`: decide which documents stay, and in the end write the shard."""
    from megatron_sep.config.load import load
    from megatron_sep.config.prepare import PrepareConfig
    from megatron_sep.prepare.jobs import merge as merge_parts

    typer.echo(merge_parts(load(PrepareConfig, config, overrides or ())))


@app.command()
def batch(
    config: RunPath,
    overrides: Overrides = None,
    step: Annotated[int, typer.Option(help="training step, from 1")] = 1,
    rows: Annotated[
        list[int] | None,
        typer.Option("--row", help="sequence of the global batch, from 0; may be given again", show_default="0"),
    ] = None,
    position: Annotated[int | None, typer.Option(help="show what this token of the sequence sees, from 0")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON in place of coloured text")] = False,
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


@app.command()
def separators(
    tokenizer: Annotated[
        Path, typer.Argument(help="Hugging Face's tokenizer.json or a sentencepiece .model", show_default=False)
    ],
    text: Annotated[Path | None, typer.Option(help="file of text to measure them on")] = None,
    merged: Annotated[bool, typer.Option("--merged", help='add merged tokens such as ." and newline runs')] = False,
    named: Annotated[
        str | None, typer.Option("--list", help="a list of the authors' code instead, such as llama-3-streaming")
    ] = None,
    add: Annotated[list[int] | None, typer.Option("--id", min=0, help="add this token id; may be given again")] = None,
    eod: Annotated[
        str | None, typer.Option(help="text of the end-of-document token, where it is not <|endoftext|> or </s>")
    ] = None,
) -> None:
    """List which tokens of a tokenizer are separators and, on a text, how dense they are and what they miss."""
    from megatron_sep.report.separators import attention_of, describe_separators

    typer.echo(describe_separators(tokenizer, text, attention_of(merged, named, tuple(add or ())), eod))

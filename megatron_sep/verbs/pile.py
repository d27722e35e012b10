"""Verbs about sets of files as the Pile is published in."""

from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.verbs.app import app

pile = typer.Typer(no_args_is_help=True, help="Check, join or cut the Pile's parts as they are published.")
app.add_typer(pile, name="pile")
ShardPrefix = Annotated[Path, typer.Argument(help="path of the set without .idx and .bin", show_default=False)]


@pile.command()
def verify(
    prefix: ShardPrefix,
    checksums: Annotated[
        Path | None, typer.Option(help="sums to hold the files against, as sha256sum writes them")
    ] = None,
) -> None:
    """Read every file of a set once, and hold it against its checksums and its index."""
    from megatron_sep.data import pile as sets

    report = sets.verify(prefix, checksums)
    typer.echo(sets.summary(report))
    raise typer.Exit(1 if report.wrong else 0)


@pile.command()
def join(
    prefix: ShardPrefix,
    output: Annotated[Path, typer.Argument(help="path of the joined set without .idx and .bin", show_default=False)],
) -> None:
    """Write the parts of a set as one file, for other programs; training reads the parts where they lie."""
    from megatron_sep.data import pile as sets

    typer.echo(f"{sets.join(prefix, output)}  {output}.bin")


@pile.command()
def split(
    prefix: ShardPrefix,
    output: Annotated[Path, typer.Argument(help="path of the parts without -00000-of-NNNNN.bin", show_default=False)],
    part_bytes: Annotated[
        int, typer.Option(help="bytes of a part; the published ones have the default")
    ] = 5_000_000_000,
) -> None:
    """Cut a joined set into parts, as the Pile is published."""
    from megatron_sep.data import pile as sets

    for part in sets.split(prefix, output, part_bytes):
        typer.echo(part)

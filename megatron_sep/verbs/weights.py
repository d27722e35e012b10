"""Verbs about weights, ours and of others."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.data.extras import needs_extra
from megatron_sep.verbs.app import app


@app.command()
def convert(
    src: Annotated[
        Path,
        typer.Argument(help="Hugging Face or GPT-NeoX directory, a checkpoint, or a run's dir", show_default=False),
    ],
    dst: Annotated[
        Path,
        typer.Argument(help="new directory: Hugging Face where SRC is ours, else a checkpoint", show_default=False),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML of the run that SRC is from; GPT-NeoX's layers need it")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="compare the logits of SRC and DST on the same text afterwards")
    ] = False,
) -> None:
    """Turn weights of Hugging Face or GPT-NeoX into a checkpoint to train on, or a checkpoint into Hugging Face's."""
    with needs_extra("safetensors", "hf"), needs_extra("transformers", "hf"):
        from megatron_sep.convert.convert import convert as make

        source = make(src, dst, config)
        typer.echo(f"wrote {dst}: {source.config.num_layers} layers, vocabulary {source.vocab_size:,}")
        if check:
            from megatron_sep.config.schema import ParallelConfig
            from megatron_sep.parallel.groups import process_groups

            with process_groups(ParallelConfig()) as topology:
                from megatron_sep.convert.check import differences

                typer.echo(str(differences(source, dst, topology)))


@app.command("verify")
def verify_weights(
    weights: Annotated[
        Path, typer.Argument(help="a run's dir, a checkpoint, or a Hugging Face directory", show_default=False)
    ],
    text: Annotated[
        Path | None, typer.Option(help="file of text to compute; without it the run's own data", show_default=False)
    ] = None,
) -> None:
    """Hold training, the fused kernel, prefill, decoding and export of the same weights against each other, in fp32.

    Sums of the files, versions, tokenizer and separators are looked at too. A line with ! is wrong (exit code 1).
    """
    warnings.simplefilter("ignore")  # of what libraries do not find
    with needs_extra("transformers", "hf"), needs_extra("safetensors", "hf"):
        from megatron_sep.config.schema import ParallelConfig
        from megatron_sep.parallel.groups import process_groups
        from megatron_sep.report.verify import verify as findings

        wrong = False
        with process_groups(ParallelConfig()) as topology:
            for line in findings(weights, text, topology):
                typer.echo(line)
                wrong |= line.startswith("!")
    typer.echo("differs" if wrong else "verified")
    raise typer.Exit(wrong)

"""Verbs that run a model with its small cache."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_sep.data.extras import needs_extra
from megatron_sep.verbs.app import app


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="a checkpoint, the dir of a run, or a Hugging Face directory", show_default=False)
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; may be given again")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt a line, all in one batch")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines to write, one for each of --prompts, thousands if need be; goes on with what it has"
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="with --out: texts that are continued at once")] = 32,
    attention: Annotated[
        Path | None, typer.Option(help="YAML with another pattern than the model's own; see configs/attention/")
    ] = None,
    streaming: Annotated[
        str | None,
        typer.Option(help="cache of bounded size: sinks, separators, window and capacity, as 4,64,256,800"),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            help="in a bounded cache: cache (a token's index in it, the default), text, or frozen (as it came in)"
        ),
    ] = None,
    prefill: Annotated[
        str | None,
        typer.Option(help="in a bounded cache: compressed (the default), or dense: prompts whole until they go on"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="most tokens to add to a prompt")] = 128,
    temperature: Annotated[float, typer.Option(help="how freely tokens are drawn; 0 takes the likeliest")] = 0.8,
    top_k: Annotated[int, typer.Option(help="draw from the k likeliest tokens; 0: from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens that are this probable together")] = 0.95,
    seed: Annotated[int, typer.Option(help="of the drawing: the same seed, the same text")] = 0,
) -> None:
    """Continue texts with a model whose cache keeps only what its pattern sees."""
    with needs_extra("transformers", "hf"), needs_extra("safetensors", "hf"):
        from megatron_sep.generate.sampler import Sampling
        from megatron_sep.generate.session import open_session, read_prompts

        sampling = Sampling(max_tokens, temperature, top_k, top_p, seed)
        if out is not None:
            from megatron_sep.generate.folder import continue_file

            options = {"attention": attention, "streaming": streaming, "positions": positions, "prefill": prefill}
            typer.echo(continue_file(checkpoint, prompts, out, prompt or (), rows, sampling, options), err=True)
            return
        texts = read_prompts(prompt or (), prompts)
        session = open_session(checkpoint, attention, streaming, positions, prefill)
    cache = session.attachment.new_cache()
    for text in session.shown(texts, sampling, cache):
        typer.echo(text, nl=False)
        sys.stdout.flush()
    typer.echo(session.cache_lines(cache), err=True)


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="a checkpoint, the dir of a run, or a Hugging Face directory", show_default=False)
    ],
    text: Annotated[
        list[Path] | None, typer.Option(help="file of text, or prefix of a shard, for perplexity; may be given again")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="of each text the first so many; all by default")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="tokens of a window, and of a task's longest text; the model's by default")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="from a window to the next; half of it by default")] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="in place of windows the whole text through one cache, so many at a time")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="with --chunk: record loss and cache every so many tokens")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch", min=1, help="windows, or texts of a task, in a pass")] = 1,
    tasks: Annotated[
        str | None, typer.Option(help="tasks of lm-eval, with commas; paper stands for the authors' list")
    ] = None,
    task_dir: Annotated[Path | None, typer.Option(help="directory with YAML of further tasks")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="examples in a prompt; the task's own by default")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents of each task; all by default")] = None,
    needle: Annotated[Path | None, typer.Option(help="text to hide numbers in and to ask for them at its end")] = None,
    needle_lengths: Annotated[str, typer.Option(help="tokens of such texts, with commas")] = "512,1024,2048",
    needle_depths: Annotated[
        str, typer.Option(help="where the number stands, 0 to 1, with commas")
    ] = "0,0.25,0.5,0.75,1",
    needle_keys: Annotated[int, typer.Option(min=1, help="numbers that are hidden in a text; one is asked for")] = 1,
    needle_samples: Annotated[int, typer.Option(min=1, help="texts of each length and depth")] = 5,
    seed: Annotated[int, typer.Option(help="of the texts with needles")] = 0,
    attention: Annotated[
        Path | None, typer.Option(help="YAML with another pattern than the model's own; see configs/attention/")
    ] = None,
    streaming: Annotated[str | None, typer.Option(help="cache of bounded size, as for generate: 4,64,256,800")] = None,
    positions: Annotated[str | None, typer.Option(help="in a bounded cache: cache, text, or frozen")] = None,
    prefill: Annotated[str | None, typer.Option(help="in a bounded cache: compressed, or dense")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON to write; what is done is kept beside it, and a killed evaluation goes on")
    ] = None,
) -> None:
    """Measure a model under what its cache keeps: perplexity of texts, tasks of lm-eval, needles in a haystack."""
    with needs_extra("transformers", "hf"), needs_extra("safetensors", "hf"):
        from megatron_sep.evaluate.evaluation import Asked, Under
        from megatron_sep.evaluate.evaluation import evaluate as measure
        from megatron_sep.evaluate.needle import haystack_of
        from megatron_sep.evaluate.table import tables

        haystack = haystack_of(needle_lengths, needle_depths, needle_keys, needle_samples, seed) if needle else None
        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        asked = Asked(
            tuple(text or ()), tokens, length, stride, chunk, every, batch_size, names, task_dir, fewshot, limit,
            needle, haystack,
        )  # fmt: skip
        found = measure(checkpoint, asked, Under(attention, streaming, positions, prefill), out)
    from rich.console import Console

    for each in tables(found):
        Console(soft_wrap=True).print(each, markup=False, highlight=False)

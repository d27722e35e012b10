"""The verbs: parse, load the configuration, call one function each. Heavy imports live inside the verb."""

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_sep.data.extras import needs_extra
from megatron_sep.errors import SepError, UserError, of_the_system

if TYPE_CHECKING:
    from megatron_sep.config import RunConfig
    from megatron_sep.train.exports import Exporter

HELP = """
Train language models whose attention keeps few tokens (SepLLM), from nothing or from a published checkpoint, and run
them with a small cache.

A YAML file describes a run; configs/runs/ has examples, which are found by their names too. Words behind it set single
keys, as in

megatron_sep train pythia-160m-sep-n64 data.path=pile/document train.steps=400
"""
EXIT_CODES = (
    "Exit codes: 0 done, 1 the run failed, 2 what was asked for cannot be done as it is, 75 saved and stopped, "
    "130 interrupted."
)


class Verbs(TyperGroup):
    """Whatever ends a verb but a fault of this program is one line and an exit code, and no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb that was named."""
        try:
            return super().invoke(ctx)
        except SepError as error:
            failure = error
        except OSError as error:
            found = of_the_system(error)
            if found is None:
                raise
            failure = found
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        if not failure.of_the_job or os.environ.get("RANK", "0") == "0":
            typer.echo(f"{failure.begins}{failure}", err=True)
        _end_though_busy(failure.exit_code)
        raise typer.Exit(failure.exit_code)


def _end_though_busy(code: int) -> None:
    """A thread inside torch, which writes or waits, does not outlive an interpreter that ends in order."""
    if any(thread.name in ("checkpoint", "store") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


app = typer.Typer(
    cls=Verbs, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP, epilog=EXIT_CODES
)
pile = typer.Typer(no_args_is_help=True, help="Check, join or cut the Pile's parts as they are published.")
app.add_typer(pile, name="pile")

RunPath = Annotated[
    Path,
    typer.Argument(help="YAML of the run, or of GPT-NeoX or SepLLM, or the name of a shipped one", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value ..., and files that go on top of the first", show_default=False),
]
PreparePath = Annotated[Path, typer.Argument(help="YAML of what to prepare; docs/data.md has one", show_default=False)]
Settings = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
ShardPrefix = Annotated[Path, typer.Argument(help="path of the set without .idx and .bin", show_default=False)]


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


def _run_config(config: Path | None, overrides: list[str], from_neox: Path | None) -> "RunConfig":
    """Of a YAML file, or of what GPT-NeoX left of a run."""
    from megatron_sep.config import ConfigError, load_config
    from megatron_sep.config.neox_run import neox_run

    if from_neox is not None:
        return neox_run(from_neox, [*([] if config is None else [str(config)]), *overrides])
    if config is None:
        raise ConfigError("train: name the YAML of a run, or --from-neox with GPT-NeoX's run directory")
    return load_config(config, overrides)


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


def main() -> None:
    """Run the verb that the command line names, and exit."""
    app()

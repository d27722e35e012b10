"""The command line itself: how a verb ends, and the arguments that several have."""

import os
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_sep.errors import SepError, of_the_system

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

RunPath = Annotated[
    Path,
    typer.Argument(help="YAML of the run, or of GPT-NeoX or SepLLM, or the name of a shipped one", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value ..., and files that go on top of the first", show_default=False),
]

"""A status line, and the same numbers to JSON lines, TensorBoard and wandb, from the first rank alone."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_sep.config.schema import MetricsConfig
from megatron_sep.files import written_aside
from megatron_sep.train.console import Values, make_console
from megatron_sep.train.written import METRICS, read_jsonl


class Sink(Protocol):
    """A place that numbers go to; whatever it raises, training goes on without it."""

    def log(self, step: int, values: Values) -> None:
        """Numbers of a step by their names, such as train/loss; a step may come twice, with other names."""
        ...

    def close(self) -> None:
        """No more numbers come."""
        ...


class Metrics:
    """Passes each step's values to its sinks. A sink that fails is named once and left out; training goes on."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def log(self, step: int, values: Values) -> None:
        self._each("log", step, values)

    def stepped(self, step: int) -> None:
        """A step is over: sinks that show how far the run is do."""
        self._where_there_is("stepped", step)

    def rewind(self, step: int) -> None:
        """The steps after this one come once more: sinks that can forget them do."""
        self._where_there_is("rewind", step)

    def close(self) -> None:
        self._each("close")

    def _where_there_is(self, action: str, step: int) -> None:
        for sink in list(self.sinks):
            if hasattr(sink, action):
                self._try(sink, action, step)

    def _each(self, action: str, *arguments: Any) -> None:
        for sink in list(self.sinks):
            self._try(sink, action, *arguments)

    def _try(self, sink: Sink, action: str, *arguments: Any) -> None:
        try:
            getattr(sink, action)(*arguments)
        except Exception as error:  # whatever a logger does, training goes on
            self.sinks.remove(sink)
            with suppress(OSError):  # a console that went away is one of them
                print(f"metrics: {type(sink).__name__} failed and is left out: {error}", flush=True)


def make_metrics(
    config: MetricsConfig, run_dir: Path, run_config: Mapping[str, Any], start: int, steps: int
) -> Metrics:
    """Every sink that is asked for; one that cannot start is named and left out."""
    makers: dict[str, Any] = {
        "metrics.jsonl": lambda: JsonLines(run_dir / METRICS, start),
    }
    if config.console != "off":
        makers = {"console": lambda: make_console(config.console, start, steps), **makers}
    if config.tensorboard:
        makers["tensorboard"] = lambda: TensorBoard(run_dir / "tensorboard", start)
    if config.wandb != "off":
        makers["wandb"] = lambda: Wandb(config, run_dir, run_config)
    metrics = Metrics([])
    for name, make in makers.items():
        try:
            metrics.sinks.append(make())
        except Exception as error:  # whatever a logger does, training goes on
            print(f"metrics: {name} is left out: {error}", flush=True)
    return metrics


class JsonLines:
    """One JSON object a line. Lines past ``start``, left by a run that was cut off, are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._open(start)

    def _open(self, start: int) -> None:
        kept = [line for line in read_jsonl(self.path) if line["step"] <= start] if start else []
        with written_aside(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a")

    def rewind(self, step: int) -> None:
        self.file.close()
        self._open(step)

    def log(self, step: int, values: Values) -> None:
        self.file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Event files below RUN/tensorboard; what was written past ``start`` is hidden."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._open(start)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(self.path), purge_step=start + 1)

    def rewind(self, step: int) -> None:
        self.writer.close()
        self._open(step)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the name of its dir, gone on with where it was cut off."""

    def __init__(self, config: MetricsConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=config.wandb_project,
            name=run_dir.name,
            dir=str(run_dir),
            mode="online" if config.wandb == "online" else "offline",
            config=dict(run_config),
            id=run_dir.name,
            resume="allow",
        )

    def log(self, step: int, values: Values) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()

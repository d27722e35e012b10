"""A status line, and the same numbers to JSON lines, TensorBoard and wandb, from the first rank alone."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_sep.config.schema import MetricsConfig
from megatron_sep.files import parse_json, written_aside

Values = Mapping[str, float]


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

    def rewind(self, step: int) -> None:
        """The steps after this one come once more: sinks that can forget them do."""
        for sink in list(self.sinks):
            if hasattr(sink, "rewind"):
                self._try(sink, "rewind", step)

    def close(self) -> None:
        self._each("close")

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
        "console": lambda: Console(steps),
        "metrics.jsonl": lambda: JsonLines(run_dir / "metrics.jsonl", start),
    }
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


class Console:
    """``step 120/1430  loss 3.214  lr 6.0e-04  |g| 0.91  118k tok/s  visible 18.3%  eta 2h11m``"""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def log(self, step: int, values: Values) -> None:
        shown = [f"step {step}/{self.steps}"]
        shown += [form(values[name]) for name, form in _SHOWN.items() if name in values]
        print("  ".join(shown), flush=True)

    def close(self) -> None:
        pass


class JsonLines:
    """One JSON object a line. Lines past ``start``, left by a run that was cut off, are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path = path
        self._open(start)

    def _open(self, start: int) -> None:
        kept = [line for line in _lines(self.path) if line["step"] <= start] if start else []
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


def read_jsonl(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; one that is none, as a kill leaves the last one, is left out."""
    return _lines(path)


def _lines(path: Path) -> list[dict[str, float]]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            values = parse_json(line)
            if isinstance(values, dict) and "step" in values and all(map(_is_number, values.values())):
                found.append(values)
    return found


def _is_number(value: Any) -> bool:
    """One that a float can be; a damaged line may have a thousand digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _count(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


_SHOWN: dict[str, Callable[[float], str]] = {
    "train/loss": lambda v: f"loss {v:.3f}",
    "valid/loss": lambda v: f"validation loss {v:.3f}",
    "valid/perplexity": lambda v: f"perplexity {v:.2f}",
    "train/lr": lambda v: f"lr {v:.1e}",
    "train/grad_norm": lambda v: f"|g| {v:.2f}",
    "speed/tokens_per_second": lambda v: f"{_count(v)} tok/s",
    "speed/mfu": lambda v: f"{100 * v:.1f}% mfu",
    "memory/peak_gib": lambda v: f"{v:.1f} GiB",
    "attention/visible": lambda v: f"visible {100 * v:.1f}%",
    "speed/seconds_left": lambda v: f"eta {_duration(v)}",
    "time/validation": lambda v: f"validated in {v:.1f}s",
    "time/save": lambda v: f"stood {v:.1f}s to save",
    "time/save_whole": lambda v: f"saved in {v:.1f}s",
}
"""What the console shows of a step, in this order."""

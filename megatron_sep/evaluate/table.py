"""Results of an evaluation as tables for the console."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def tables(results: Mapping[str, Any]) -> Iterator[Any]:
    """A line that says what was measured with, and rich's tables: texts, tasks and needle, as far as they are there."""
    installed = " ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield f"{results['dtype']} on {results['device']}; {installed}"
    for each in results["pattern"]:
        first, last = each["layers"]
        yield f"layers {first} to {last}: {each['policy']}" if first < last else f"layer {first}: {each['policy']}"
    if "texts" in results:
        yield _texts(results["texts"])
    if "tasks" in results:
        yield _tasks(results["tasks"])
    for measure in ("choice", "exact") if "needle" in results else ():
        yield _needle(results["needle"], measure)


def _table(title: str, columns: Sequence[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _texts(texts: Mapping[str, Any]) -> Any:
    table = _table("texts", ("text", "tokens", "loss", "perplexity", "kept", "of a query"))
    for name, found in texts.items():
        for each in [*found.get("recorded", [])[:-1], found]:
            table.add_row(
                name if each is found else f"  up to {each['tokens']:,}", f"{each['tokens']:,}", f"{each['loss']:.4f}",
                f"{each['perplexity']:,.3f}", f"{each['retention']:.1%}", f"{each['live']:,.1f}",
            )  # fmt: skip
    return table


def _tasks(tasks: Mapping[str, Any]) -> Any:
    table = _table("tasks", ("task", "shots", "samples", "metric", "value", "error", "kept"))
    for found in tasks.values():
        for name, metrics in found["metrics"].items():
            for metric, value in metrics.items():
                if "_stderr" in metric:
                    continue
                base, _, chosen = metric.partition(",")
                error = metrics.get(f"{base}_stderr{',' + chosen if chosen else ''}")
                table.add_row(
                    name, str(found["fewshot"].get(name, "")), str(found["samples"].get(name, "")), metric,
                    f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{found['retention']:.1%}",
                )  # fmt: skip
    return table


def _needle(cells: Sequence[Mapping[str, float]], measure: str) -> Any:
    lengths = list(dict.fromkeys(each["length"] for each in cells))
    table = _table(f"needle, {measure}", ("depth", *(f"{length:,}" for length in lengths)))
    for depth in dict.fromkeys(each["depth"] for each in cells):
        row = [each[measure] for each in cells if each["depth"] == depth]
        table.add_row(f"{depth:.0%}", *(f"{value:.0%}" for value in row))
    kept = [_mean([each["retention"] for each in cells if each["length"] == length]) for length in lengths]
    table.add_row("kept", *(f"{value:.1%}" for value in kept))
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

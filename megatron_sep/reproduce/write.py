"""A result as Markdown, JSON and pictures."""

import json
from dataclasses import asdict
from pathlib import Path

from megatron_sep.files import remove, written_aside
from megatron_sep.report.picture import save
from megatron_sep.reproduce.item import Item, Result, Table

PICTURES = (".png", ".svg")


def to_markdown(item: Item, result: Result) -> str:
    """Tables, sentences and links to the pictures, which lie beside the file."""
    parts = [f"# {item.title} ({item.kind})", *map(_table, result.tables), *result.notes]
    parts += [f"![{name}]({name}.png)" for name in result.figures]
    parts += [f"Not part of it: {item.rest}"] if item.rest else []
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    def shown(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign},.{table.digits}f}"

    lines = [f"**{table.title}**", "", "| | ours | paper | difference | why |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {shown(row.ours)} | {shown(row.paper)} | {shown(row.difference, '+')} | {row.why} |"
        for row in table.rows
    ]
    return "\n".join(lines)


def to_json(item: Item, result: Result) -> str:
    """The numbers, not rounded."""
    tables = [
        {"title": table.title, "rows": [asdict(row) | {"difference": row.difference} for row in table.rows]}
        for table in result.tables
    ]
    about = {"item": item.name, "title": item.title, "kind": item.kind, "not_part_of_it": item.rest}
    return json.dumps(about | {"tables": tables, "notes": result.notes}, indent=1, ensure_ascii=False) + "\n"


def write(item: Item, result: Result, folder: Path) -> list[Path]:
    """Write NAME.md, NAME.json and the pictures; returns their paths. Raises OSError, MissingLibraryError."""
    texts = {".md": to_markdown(item, result), ".json": to_json(item, result)}
    paths = []
    for suffix, text in texts.items():
        with written_aside(folder / f"{item.name}{suffix}") as aside:
            aside.write_text(text, encoding="utf-8")
        paths.append(folder / f"{item.name}{suffix}")
    for name, figure in result.figures.items():
        pictures = [folder / f"{name}{suffix}" for suffix in PICTURES]
        save(figure, *pictures, dpi=150)
        paths += pictures
    remove(folder / f"{item.name}.parts")
    return paths

"""What the site has beside docs/: settings from the schema, pages of the API, and the pages that lie beside the code.

mkdocs build --strict            # mkdocs.yml names this file as its hooks; the site is in site/
"""

import json
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_sep.config.schema import RunConfig

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "megatron_sep/kernels/README.md": "kernels.md",
    "megatron_sep/kernels/sep_attention/README.md": "kernels/sep_attention.md",
    "megatron_sep/kernels/sep_decode/README.md": "kernels/sep_decode.md",
}
"""Pages that lie beside the code, and what the site calls them."""
REPORTS = [f"reports/{path.name}" for path in sorted((ROOT / "reports").iterdir()) if path.suffix in (".md", ".png")]
"""Pages that docs/reproduction.md leads to, and their pictures: under the same names, and not in the navigation."""
API = {
    "attention": ("What a token may see", ["attention.pattern", "attention.layers", "attention.streaming"]),
    "kernels": ("Operations and their implementations", ["kernels.sep_attention", "kernels.registry", "kernels.call"]),
    "generate": ("The cache under any model", ["generate.attach", "generate.cache", "generate.policies"]),
    "evaluate": ("Measuring", ["evaluate.stretches", "evaluate.needle"]),
    "train": ("Training", ["train.engine", "train.loop", "config.load"]),
}
"""Pages of docstrings: title, and modules of megatron_sep."""
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
"""Of Markdown, but to an address or inside its own page: text, target, anchor; of a picture what follows the mark."""
_WORDS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    Path: "path",
    type(None): "null",
}
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    made = {"settings.md": settings_page()}
    made |= {f"api/{name}.md": api_page(*page) for name, page in API.items()}
    made |= {page: (ROOT / source).read_text(encoding="utf-8") for source, page in ELSEWHERE.items()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for name in REPORTS:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:  # noqa: ARG001
    """Point links to pages beside the code at the site's copies; what is no page keeps its name without a link."""
    name = page.file.src_uri
    return LINK.sub(lambda found: _relinked(found, name, files), markdown)


def _relinked(found: re.Match[str], page: str, files: "Files") -> str:
    text, target, anchor = found[1], found[2], found[3] or ""
    beside = {made: source for source, made in ELSEWHERE.items()}
    here = PurePosixPath(beside.get(page, f"docs/{page}")).parent
    meant = os.path.normpath(here / target)
    same = meant if meant in REPORTS else meant.removeprefix("docs/") if meant.startswith("docs/") else ""
    name = ELSEWHERE.get(meant, same)
    if name and files.get_file_from_path(name) is not None:
        return f"[{text}]({os.path.relpath(name, PurePosixPath(page).parent)}{anchor})"
    if not (ROOT / meant).exists():
        return found[0]  # broken, which --strict tells
    return f"{text} (`{meant}`)"


def api_page(title: str, modules: list[str]) -> str:
    """A page of the docstrings of ``modules``."""
    return f"# {title}\n\n" + "\n".join(f"::: megatron_sep.{module}\n" for module in modules)


def settings_page() -> str:
    """Every setting of a run: type, bounds, default, and what it means."""
    head = (
        "# Settings",
        "",
        "Made from `megatron_sep/config/schema.py`. Each is a key of a run's YAML, or `section.key=value` behind a "
        "verb. Unknown keys are refused. `megatron_sep show CONFIG` prints the value of each.",
    )
    return "\n".join([*head, *_section("", RunConfig)]) + "\n"


def _section(name: str, section: type[BaseModel]) -> Iterator[str]:
    """The table of a section, then those of the sections in it."""
    yield from ("", f"## {name or 'The run'}", "", _cell(section.__doc__), "")
    prefix = f"{name}." if name else ""
    fields = {f"{prefix}{key}": field for key, field in section.model_fields.items()}
    rows = [_row(key, field) for key, field in fields.items() if not _is_section(field.annotation)]
    if rows:
        yield from ("| setting | takes | default | |", "|---|---|---|---|", *rows)
    for key, field in fields.items():
        for inner in sections_in(field.annotation):
            yield from _section(key, inner)


def _row(key: str, field: FieldInfo) -> str:
    return f"| `{key}` | {kind_of(field)} | {_default(field)} | {_cell(field.description)} |"


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of a type may have in it."""
    if _is_section(annotation):
        yield annotation
    for each in get_args(annotation):
        yield from sections_in(each)


def kind_of(field: FieldInfo) -> str:
    """The type of a setting and its bounds, in words."""
    return _cell(", ".join([_words(field.annotation), *_bounds(field)]))


def _words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([_words(inside[0]), *(bound for each in annotation.__metadata__ for bound in _bounds(each))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(each) for each in inside)
    if origin is tuple:
        return f"list of {_words(inside[0])}"
    return "section" if _is_section(annotation) else _WORDS.get(annotation, str(annotation))


def _bounds(metadata: Any) -> list[str]:
    """Of a field, or of one of its limits."""
    limits = metadata.metadata if isinstance(metadata, FieldInfo) else [metadata]
    return [
        f"{sign} {getattr(limit, name)}" for limit in limits for name, sign in _SIGNS.items() if hasattr(limit, name)
    ]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, default=str)}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")

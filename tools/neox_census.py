"""Count which files of GPT-NeoX, Pythia and SepLLM are taken, tree by tree, and why the others are refused.

    python tools/neox_census.py gpt-neox/configs pythia/models SepLLM     seconds on one core

Each `*.yml` below a directory is shown by itself, as `show` does, with data and tokenizer given. No file of these trees
is part of this project: clone them first.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sep.config import sketch_config
from megatron_sep.errors import UserError
from megatron_sep.report.describe import describe

GIVEN = ("data.path=text_document", "tokenizer.path=tokenizer.json")
"""What a user of another machine gives; neither file has to be there for `show`."""


@dataclass(frozen=True)
class Finding:
    """What became of a file."""

    path: Path
    reasons: tuple[str, ...] = ()
    """Of a refusal, one each; none where the file is taken."""

    @property
    def taken(self) -> bool:
        return not self.reasons


def examine(path: Path) -> Finding:
    """Show one file."""
    try:
        describe(sketch_config(path, GIVEN))
    except UserError as error:
        first, *mistakes = str(error).splitlines()
        return Finding(path, tuple(line.strip() for line in mistakes) or (first.removeprefix(f"{path}: "),))
    return Finding(path)


def examine_tree(tree: Path) -> list[Finding]:
    """Every file below a directory, in the order of their names."""
    return [examine(path) for path in sorted(tree.rglob("*.y*ml"))]


def table(trees: dict[Path, list[Finding]]) -> Iterator[str]:
    """Counts, a row a tree, in Markdown."""
    yield "| tree | files | taken | refused, with the reason |"
    yield "|---|---|---|---|"
    for tree, found in trees.items():
        taken = sum(finding.taken for finding in found)
        yield f"| {tree} | {len(found)} | {taken} | {len(found) - taken} |"


def refusals(tree: Path, found: list[Finding]) -> Iterator[str]:
    """Each first reason, and the files that are refused for it."""
    files: dict[str, list[str]] = defaultdict(list)
    for finding in found:
        if not finding.taken:
            more = len(finding.reasons) - 1
            name = str(finding.path.relative_to(tree))
            files[finding.reasons[0]].append(f"{name} (and {more} more)" if more else name)
    for reason, names in files.items():
        yield f"{len(names)}: {reason}\n     {', '.join(names)}"


def main() -> None:
    """Examine the trees that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="DIR")
    trees = {tree: examine_tree(tree) for tree in parser.parse_args().trees}
    empty = [str(tree) for tree, found in trees.items() if not found]
    if empty:
        parser.error(f"no *.yml below {', '.join(empty)}")
    print("\n".join(table(trees)))
    for tree, found in trees.items():
        print("", *refusals(tree, found), sep="\n")


if __name__ == "__main__":
    main()

"""Text for `prepare` in which every stage finds something, and how two shards are compared."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_sep.config.prepare import DecontaminateConfig, DeduplicateConfig, TextSourceConfig


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(["cat", "dog", "sat,", "it", "is.", "lines;", "12"]) for _ in range(words))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def source(*paths: Path, **settings: Any) -> TextSourceConfig:
    return TextSourceConfig(paths=tuple(map(str, paths)), **settings)


def corpus_of_all_kinds(folder: Path) -> list[TextSourceConfig]:
    """Seven files of two sources, one of them empty; weights, repeats near and exact across files, bad records."""
    generator = random.Random(5)
    texts = [sentence(generator, generator.randrange(5, 200)) for _ in range(150)]
    texts += [text.replace("cat", "cow", 1) for text in texts[:20]] + texts[20:40]
    generator.shuffle(texts)
    for number in range(6):
        write_jsonl(folder / f"text{number}.jsonl", [*texts[number::6], " "])
    (folder / "empty.jsonl").touch()
    files = sorted(folder.glob("*.jsonl"))
    return [source(*files[:3], weight=2.5), source(*files[3:], weight=0.7)]


def all_stages(folder: Path, sources: list[TextSourceConfig]) -> dict[str, Any]:
    """Settings under which every stage has something to do."""
    tests = write_jsonl(folder / "held_out" / "test.jsonl", ["x " + json.loads(line)["text"] for line in
        Path(sources[0].paths[1]).read_text().splitlines()[:3]])  # fmt: skip
    return {
        "on_bad": "skip", "shuffle": True, "normalize": "nfc",
        "deduplicate": DeduplicateConfig(exact=True, near=True, permutations=128),
        "decontaminate": DecontaminateConfig(paths=(str(tests),), words=8),
    }  # fmt: skip


def same_files(one: Path, other: Path) -> None:
    """All that two shards consist of, but for their names in the receipts."""
    for suffix in (".bin", ".idx", ".manifest.json", ".contamination.jsonl"):
        first, second = (path.with_name(path.name + suffix).read_text("latin-1") for path in (one, other))
        assert first.replace(one.name, other.name) == second, suffix

"""F7, F8 and F14: text, documents and YAML as nobody should write them."""

import gzip
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

from faults.case import Times, Trial, WrongError, expect
from faults.verbs import Ended, call
from faults.world import World, lines

_SEPARATORS = ". , ; ! ?"


def _documents(random: Random, kind: str, separators: list[int], plain: list[int]) -> list[list[int]]:
    """Ids of documents of one kind, each closed by the end-of-document token 0; ids that no separator is: ``plain``."""
    make: dict[str, Callable[[], list[int]]] = {
        "empty": list,
        "the end alone": lambda: [0],
        "one token": lambda: [random.choice(plain), 0],
        "no separator": lambda: [*random.choices(plain, k=random.randint(1, 90)), 0],
        "separators alone": lambda: [*random.choices(separators, k=random.randint(1, 90)), 0],
        "one long document": lambda: [*random.choices(plain + separators, k=900), 0],
    }
    return [make[kind]() for _ in range(1 if kind == "one long document" else 60)]


KINDS = ("empty", "the end alone", "one token", "no separator", "separators alone", "one long document")


def odd_documents(trial: Trial) -> Times:
    """Documents of one odd kind among others, or nothing else: trained on, and each plan is the definition."""
    from megatron_sep.data.shards import write_shards

    random, world = trial.random, trial.world
    separators, plain = _kinds_of_ids(world)
    kind = KINDS[trial.number % len(KINDS)]
    documents = _documents(random, kind, separators, plain)
    if kind in ("empty", "the end alone") or random.random() < 0.5:
        documents += _documents(random, "no separator", separators, plain)
    random.shuffle(documents)
    prefix = trial.folder / "odd"
    write_shards(prefix, documents, 300)
    settings = (f"data.path={prefix}", "train.steps=4", "attention.document_boundaries=true")
    ended = world.train(trial.folder / "run", *settings)
    expect(ended.code == 0, f"{kind}: {ended.code}: {ended.text[-300:]}")
    found = lines(trial.folder / "run")
    expect(len(found) == 4 and all(math.isfinite(line["train/loss"]) for line in found), f"{kind}: {found}")
    _plans_are_the_definition(world, trial.folder / "run", settings)
    return Times()


def _kinds_of_ids(world: World) -> tuple[list[int], list[int]]:
    from megatron_sep.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(world.tokenizer)
    separators = [i for mark in _SEPARATORS.split() for i in tokenizer.encode(mark)]
    return separators, [i for i in range(1, tokenizer.vocab_size) if i not in separators]


def _plans_are_the_definition(world: World, run: Path, settings: tuple[str, ...]) -> None:
    """Raise WrongError where a query of the first batch sees another key than the rule says, counted key by key."""
    import torch

    from megatron_sep.attention.rules import LayerRules
    from megatron_sep.data.open_data import open_data
    from megatron_sep.data.tokenizer import load_tokenizer

    config, tokenizer = world.config(run, *settings), load_tokenizer(world.tokenizer)
    rules = LayerRules.of(config.attention, config.model.num_layers, tokenizer)
    ids = torch.from_numpy(open_data(config.data, "train", 32, tokenizer, 16).take(0, 4).ids)[:, :-1]
    for plan, pattern in zip(rules.plans(ids), rules.patterns, strict=True):
        seen = plan.dense()
        for row, tokens in enumerate(ids.tolist()):
            expected = _seen(tokens, tokenizer.eod_id, pattern)
            if [sum(q) for q in expected] != plan.num_visible()[row].tolist() or seen[row].tolist() != expected:
                raise WrongError(f"another mask than the rule's: {tokens}")


def _seen(tokens: list[int], end: int, pattern: object) -> list[list[bool]]:
    """The rule of docs/design.md, one query and one key at a time."""
    window, sinks = getattr(pattern, "window"), getattr(pattern, "sinks")  # noqa: B009
    separators = getattr(pattern, "separator_ids")  # noqa: B009
    starts, start = [], 0
    for i, _ in enumerate(tokens):
        starts.append(start)
        start = i + 1 if tokens[i] == end else start
    return [
        [
            j <= i
            and starts[i] == starts[j]
            and (window is None or i - j < window or j - starts[j] < sinks or tokens[j] in separators)
            for j in range(len(tokens))
        ]
        for i in range(len(tokens))
    ]


_GOOD = b'{"text": "a document"}\n'


def _bad_lines(random: Random) -> dict[str, bytes]:
    text = json.dumps({"text": "a document of some length " * random.randint(1, 9)}).encode()
    place = random.randrange(12, len(text) - 3)
    return {
        "bad UTF-8": text[:place] + bytes([random.randint(0x80, 0xFF)]) + text[place:],
        "broken JSON": text[: random.randrange(3, len(text) - 1)],
        "NUL byte": text[:place] + b"\\u0000" + text[place:],
        "missing field": b'{"txt": "a", "x": 1}',
        "field is no text": random.choice((b'{"text": 3}', b'{"text": null}', b'{"text": ["a"]}', b'{"text": {}}')),
        "too long": b'{"text": "' + b"x" * random.choice((3000, 200_000)) + b'"}',
        "blank": random.choice((b'{"text": " \\n\\t"}', b'{"text": ""}', b"  ")),
    }


def bad_records(trial: Trial) -> Times:
    """Bad records among good ones, plain and compressed, cut short or with a BOM: counted by reason, or named."""
    random = trial.random
    records, expected = [], Counter[str]()
    for _ in range(random.randint(1, 40)):
        reason, line = random.choice(list(_bad_lines(random).items()))
        bad = random.random() < 0.4
        records.append(line + b"\n" if bad else _GOOD)
        expected[reason if bad else "good"] += 1
    data = (b"\xef\xbb\xbf" if random.random() < 0.3 else b"") + b"".join(records)
    cut = random.random() < 0.4
    path = _written(trial, data, cut)
    began = time.monotonic()
    if cut:
        return _counts_add_up(path, began, b"".join(records).count(b"\n"))
    return _counts_are(path, records, expected, began)


def _written(trial: Trial, data: bytes, cut: bool) -> Path:
    import zstandard

    suffix, compress = trial.random.choice(
        [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
    )
    path = trial.folder / f"a.jsonl{suffix}"
    data = compress(data)
    path.write_bytes(data[: trial.random.randrange(1, len(data))] if cut else data)
    return path


def _counts_are(path: Path, records: list[bytes], expected: Counter[str], began: float) -> Times:
    from megatron_sep.prepare.text import Limits, Tally, TextError, read_documents

    tally = Tally()
    good = sum(1 for _ in read_documents(path, Limits(on_bad="skip", max_bytes=1000), tally))
    found = Counter({"good": good, **tally.dropped})
    if +found != +expected:
        raise WrongError(f"{found} is not {expected}")
    first = next((number for number, record in enumerate(records, 1) if record is not _GOOD), None)
    if first is None:
        return Times()
    try:
        list(read_documents(path, Limits(on_blank="fail", max_bytes=1000)))
    except TextError as error:
        expect(f"{path}, line {first}: " in str(error), error)
        return Times(time.monotonic() - began)
    raise WrongError(f"line {first} was taken for good")


def _counts_add_up(path: Path, began: float, most: int) -> Times:
    """Of a file that ends in the middle: every whole line before the cut, and the damage is one of the reasons."""
    from megatron_sep.prepare.text import Limits, Tally, read_documents

    tally = Tally()
    good = sum(1 for _ in read_documents(path, Limits(on_bad="skip", max_bytes=1000), tally))
    expect(tally.read == good + tally.dropped.total(), tally)
    expect(tally.read <= most + 1, f"{tally.read} records of {most}")
    if path.suffix != ".jsonl" and not tally.dropped["damaged file"] and tally.read != most:
        raise WrongError("a file that was cut short passed for a whole one")
    return Times(time.monotonic() - began)


def _bomb(levels: int) -> str:
    """Nine aliases a level of the level before."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(rows)


YAML: dict[str, tuple[str, str]] = {
    "an unknown section": ("modle: {num_layers: 2}", "modle"),
    "a mistyped key": ("model: {num_layer: 2}", "did you mean model.num_layers"),
    "a wrong type": ("model: {num_layers: two}", "model.num_layers"),
    "a fraction of a layer": ("model: {num_layers: 2.5}", "model.num_layers"),
    "a key twice": ("model: {num_layers: 2, num_layers: 3}", "num_layers"),
    "a section twice": ("model: {num_layers: 2}\nmodel: {num_layers: 3}", "model"),
    "an aliases bomb": (_bomb(9), ""),
    "a larger bomb": (_bomb(60), ""),
    "an alias in itself": ("model: &m {num_layers: *m}", ""),
    "a list in itself": ("model: &m [*m]", ""),
    "code": ("dir: !!python/object/apply:os.system ['touch CANARY']", "python"),
    "a class": ("dir: !!python/name:os.system", "python"),
    "tabs": ("model:\n\tnum_layers: 2", ""),
    "no mapping": ("- a\n- b", "mapping"),
    "an empty window": ("attention: {window: 0}", "attention.window"),
    "a negative window": ("attention: {window: -3}", "attention.window"),
    "a layer that is not there": ("attention: {window: 8, full_layers: [7]}", ""),
    "heads that do not divide": ("model: {hidden_size: 30, num_attention_heads: 4}", ""),
    "tensor parallel heads that do not divide": ("parallel: {tensor: 3}", ""),
    "no steps": ("train: {steps: 0}", "train.steps"),
    "not a number": ("optimizer: {lr: .nan}", "optimizer.lr"),
    "beyond all numbers": (f"train: {{seed: {10**400}}}", ""),
    "a float that overflows": ("optimizer: {lr: 1e999}", "optimizer.lr"),
    "nested deeply": ("a: " + "[" * 3000 + "]" * 3000, ""),
    "braces that do not close": ("model: {" * 200, ""),
    "extends itself": ("extends: bad.yaml", "extends itself"),
    "extends a device": ("extends: /dev/zero", ""),
    "extends nothing": ("extends: none.yaml", "none.yaml"),
    "NUL": ('tokenizer: {path: "a\\0b"}', "no such file"),
    "bytes that are no text": ("dir: \udcff", ""),
}


def bad_yaml(trial: Trial) -> Times:
    """A file on top of the run's own: one message within two seconds, nothing written, no code run."""
    name = list(YAML)[trial.number % len(YAML)]
    text, words = YAML[name]
    path = trial.folder / "bad.yaml"
    canary = trial.folder / "canary"
    path.write_bytes(text.replace("CANARY", str(canary)).encode("utf-8", "surrogateescape"))
    ended = call(trial.folder / "log", *trial.world.words(trial.folder / "run", str(path)))
    _refused(ended, name, words)
    expect(not canary.exists(), f"{name}: its code has run")
    expect(not lines(trial.folder / "run"), f"{name}: was trained")
    return Times(ended.seconds)


def _refused(ended: Ended, name: str, words: str) -> None:
    if ended.code == 0:
        raise WrongError(f"{name}: was taken")
    expect(ended.code == 2 and bool(ended.message), f"{name}: {ended.code}: {ended.text[-300:]}")
    expect(words in ended.text, f"{name}: {words!r} is not in {ended.text!r}")

"""F4 to F6 and F15: files that are damaged, that do not belong together, or that were made to do harm."""

import json
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from faults.case import Times, Trial, WrongError, expect
from faults.killing import equals_straight, recovery, told
from faults.world import EVERY, STEPS, numbers

Damage = Callable[[Random, Path], None]


def truncate(random: Random, path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def flip_a_bit(random: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def zero_the_tail(random: Random, path: Path) -> None:
    """As a file system may leave it after a power cut: the length is right, the end is not."""
    data = path.read_bytes()
    whole = random.randrange(len(data.rstrip(b"\0")))
    path.write_bytes(data[:whole] + bytes(len(data) - whole))


def remove(_: Random, path: Path) -> None:
    path.unlink()


def swap_with_its_fellow(random: Random, path: Path) -> None:
    """Two shards of a checkpoint that have changed places."""
    shards = sorted(path.parent.glob("*.distcp"))
    one, two = random.sample(shards, 2)
    kept = one.read_bytes()
    shutil.copyfile(two, one)
    two.write_bytes(kept)


def edit_the_manifest(random: Random, path: Path) -> None:
    """Another size, sum or step in it."""
    manifest = path.parent / "manifest.json"
    text = manifest.read_text()
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    place = random.choice(digits)
    manifest.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


_OF_CHECKPOINTS: tuple[Damage, ...] = (
    truncate,
    flip_a_bit,
    zero_the_tail,
    remove,
    swap_with_its_fellow,
    edit_the_manifest,
)


def checkpoint(trial: Trial) -> Times:
    """The newest checkpoint, the two newest or all are damaged: named, passed over, and what follows is exact."""
    run, random = trial.world.copy(trial.folder / "run"), trial.random
    found = sorted((run / "checkpoints").glob("step-????????"), reverse=True)
    spoilt = found[: random.choice((1, 1, 2, len(found)))]
    for path in spoilt:
        damage = _OF_CHECKPOINTS[trial.number % len(_OF_CHECKPOINTS)]
        damage(random, random.choice(sorted(file for file in path.iterdir() if file.stat().st_size)))
    if len(spoilt) == len(found):
        return _all_are_refused(trial, run, len(found))
    start = time.monotonic()
    seconds = _passed_over(run, spoilt, found[len(spoilt)])
    began = time.time()
    ended = trial.world.train(run)
    expect(ended.code == 0, f"could not go on: {ended.text[-300:]}")
    if f"at step {STEPS - EVERY * len(spoilt)}" not in ended.text:
        raise WrongError(f"did not go on from the newest whole one: {ended.text[-300:]}")
    equals_straight(trial.world, run)
    return Times(seconds - start, recovery(run, began))


def _passed_over(run: Path, spoilt: list[Path], whole: Path) -> float:
    """The moment when every damaged one is named. Raises WrongError where one is taken."""
    from megatron_sep.weights.sealed import fault_of, newest_verified

    for path in spoilt:
        if fault_of(path) is None:
            raise WrongError(f"{path}: its damage is not seen")
    named = time.monotonic()
    if newest_verified(run / "checkpoints") != whole:
        raise WrongError(f"{whole} is not the one that is taken")
    return named


def _all_are_refused(trial: Trial, run: Path, count: int) -> Times:
    before = (run / "metrics.jsonl").read_bytes()
    ended = trial.world.train(run)
    if ended.code == 0 or (run / "metrics.jsonl").read_bytes() != before:
        raise WrongError(f"began anew in a dir of damaged checkpoints: {ended.text[-300:]}")
    return Times(told(ended, 2, f"none of its {count} checkpoint(s) is whole"))


_HEADER = struct.Struct("<9sQBQQ")


def _field(place: int, kind: str, values: Callable[[Random], int]) -> Damage:
    def write(random: Random, prefix: Path) -> None:
        path = prefix.with_suffix(".idx")
        data = bytearray(path.read_bytes())
        struct.pack_into(kind, data, place, values(random))
        path.write_bytes(data)

    return write


def _in_index(damage: Damage) -> Damage:
    return lambda random, prefix: damage(random, prefix.with_suffix(".idx"))


def _cut_tokens(random: Random, prefix: Path) -> None:
    truncate(random, prefix.with_suffix(".bin"))


def _longer_tokens(random: Random, prefix: Path) -> None:
    with prefix.with_suffix(".bin").open("ab") as file:
        file.write(random.randbytes(random.randint(1, 5000)))


def _other_index(random: Random, prefix: Path) -> None:
    """Of a shard with as many documents, of other lengths."""
    from megatron_sep.data.shards import write_shards

    other = prefix.with_name("other")
    write_shards(other, [[1] * random.randint(100, 500) for _ in range(60)], 300)
    shutil.copyfile(other.with_suffix(".idx"), prefix.with_suffix(".idx"))


def _value(start: int, kind: str) -> Damage:
    """One of the 60 lengths, offsets or document bounds becomes something else."""

    def write(random: Random, prefix: Path) -> None:
        size = struct.calcsize(kind)
        place = start + size * random.randrange(1, 60)
        far = random.choice((-1, -(2**31), 2**31 - 1, 7, 10**9))
        _field(place, kind, lambda _: far)(random, prefix)

    return write


_OF_SHARDS: tuple[Damage, ...] = (
    _cut_tokens,
    _longer_tokens,
    _other_index,
    _in_index(truncate),
    _in_index(flip_a_bit),
    _in_index(zero_the_tail),
    _field(0, "<9s", lambda random: random.randbytes(9)),  # type: ignore[arg-type,return-value]
    _field(9, "<Q", lambda random: random.randrange(2, 2**63)),
    _field(17, "<B", lambda random: random.choice((0, 1, 4, 5, 6, 7, 9, 255))),
    _field(18, "<Q", lambda random: random.choice((0, 59, 61, 2**40, 2**63))),
    _field(26, "<Q", lambda random: random.choice((0, 60, 62, 2**40, 2**63))),
    _value(_HEADER.size, "<i"),
    _value(_HEADER.size + 4 * 60, "<q"),
    _value(_HEADER.size + 12 * 60, "<q"),
)


def shard(trial: Trial) -> Times:
    """A .bin or .idx that is damaged or of another shard: refused when it is opened, or the same tokens as before."""
    from megatron_sep.data.shards import Shard, ShardError

    prefix = trial.folder / "corpus"
    for suffix in (".bin", ".idx"):
        shutil.copyfile(trial.world.corpus.with_suffix(suffix), prefix.with_suffix(suffix))
    before = Shard.open(prefix)
    tokens = before.tokens(0, before.num_tokens).tolist()
    del before
    _OF_SHARDS[trial.number % len(_OF_SHARDS)](trial.random, prefix)
    began = time.monotonic()
    try:
        found = Shard.open(prefix)
    except ShardError as error:
        expect(str(prefix) in str(error), f"names no file: {error}")
    else:
        if found.tokens(0, found.num_tokens).tolist() != tokens:
            raise WrongError("other tokens, in silence")
        return Times()
    seconds = time.monotonic() - began
    if trial.number % 4 == 0:
        told(trial.world.train(trial.folder / "run", f"data.path={prefix}"), 2, str(prefix))
    return Times(seconds)


def token_ids(trial: Trial) -> Times:
    """Ids that the vocabulary does not have: named with their document when their batch is due, and never learnt."""
    from megatron_sep.data.shards import write_index

    random, prefix = trial.random, trial.folder / "corpus"
    ids = np.fromfile(trial.world.corpus.with_suffix(".bin"), np.uint16).astype(np.int32)
    wrong = random.choice((-1, -(2**31), 300, 65535, 2**31 - 1))
    places = random.sample(range(len(ids)), random.choice((1, 20, 200)))
    ids[places] = wrong
    ids.tofile(prefix.with_suffix(".bin"))
    header = trial.world.corpus.with_suffix(".idx").read_bytes()
    lengths = np.frombuffer(header, np.int32, 60, _HEADER.size)
    write_index(prefix.with_suffix(".idx"), lengths, np.int32)
    ended = trial.world.train(trial.folder / "run", f"data.path={prefix}")
    learnt = numbers(trial.folder / "run")
    if learnt != numbers(trial.world.straight)[: len(learnt)]:
        raise WrongError("an id that the vocabulary lacks was learnt from")
    if ended.code == 0:
        return Times()  # the batches of these steps had none of them
    seconds = told(ended, 2, "corpus.bin: document ", f"token id {wrong} is not in the vocabulary of")
    document, token = (
        int(ended.message.split(f"{word} ")[1].split(",")[0].split(" ")[0]) for word in ("document", "token")
    )
    expect(ids[lengths[:document].sum() + token] == wrong, f"it does not stand there: {ended.message}")
    return Times(seconds)


def harmful(trial: Trial) -> Times:
    """Weights that were made to run code, or to take memory: refused; nothing ran, nothing was allocated."""
    canary = trial.folder / "canary"
    kinds = (_checkpoint_with_code, _pickle_with_code, _layers_with_code, _header_bomb, _overlapping, _outside)
    path, config = kinds[trial.number % len(kinds)](trial, canary)
    from megatron_sep.errors import UserError
    from megatron_sep.weights.open_source import open_source

    began, before = time.monotonic(), _peak()
    try:
        for _ in open_source(path, config):
            pass
    except UserError as error:
        expect(str(path) in str(error), f"names no file: {error}")
    else:
        raise WrongError("was taken for good")
    seconds = time.monotonic() - began
    if canary.exists():
        raise WrongError("its code has run")
    expect(_peak() - before < 200_000, f"took {(_peak() - before) / 1e3:.0f} MB")
    return Times(seconds)


def _peak() -> int:
    """Most memory that this process has had, in kB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _checkpoint_with_code(trial: Trial, canary: Path) -> tuple[Path, Any]:
    """Code in .metadata or inside one of its values, with sums and seal made to fit."""
    from support.disk import Bomb

    from megatron_sep.weights.sealed import records_of, write_manifest

    path = sorted((trial.world.copy(trial.folder / "run") / "checkpoints").glob("step-*"))[-1]
    value: Any = Bomb(canary)
    if trial.random.random() < 0.5:
        value = pickle.loads((path / ".metadata").read_bytes())
        value.planner_data = [Bomb(canary)]
    (path / ".metadata").write_bytes(pickle.dumps(value, protocol=trial.random.randint(0, 5)))
    description = json.loads((path / "manifest.json").read_text())["description"]
    for name in ("manifest.json", "manifest.sha256"):
        (path / name).unlink()
    write_manifest(path, description, records_of(path))
    return path, None


def _pickle_with_code(trial: Trial, canary: Path) -> tuple[Path, Any]:
    """pytorch_model.bin, in torch's zip or in the older format."""
    import torch
    from support.disk import Bomb

    folder = _hugging_face(trial)
    value = {"gpt_neox.embed_in.weight": torch.zeros(3), "other": Bomb(canary)}
    torch.save(value, folder / "pytorch_model.bin", _use_new_zipfile_serialization=trial.random.random() < 0.5)
    return folder, None


def _layers_with_code(trial: Trial, canary: Path) -> tuple[Path, Any]:
    """One of GPT-NeoX's layer files."""
    import torch
    from support.disk import Bomb

    folder = trial.folder / "layers"
    folder.mkdir()
    model = trial.world.config(trial.folder / "run").model
    for layer in (0, *range(2, model.num_layers + 2), model.num_layers + 3, model.num_layers + 4):
        torch.save(
            {"word_embeddings.weight": torch.zeros(4, 4)}, folder / f"layer_{layer:02d}-model_00-model_states.pt"
        )
    spoilt = trial.random.choice(sorted(folder.iterdir()))
    torch.save({"word_embeddings.weight": Bomb(canary)}, spoilt)
    return folder, model


def _hugging_face(trial: Trial) -> Path:
    folder = trial.folder / "model"
    folder.mkdir()
    config = {
        "model_type": "gpt_neox",
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 300,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _safetensors(folder: Path, header: bytes, data: bytes, length: int | None = None) -> tuple[Path, Any]:
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + header + data)
    return folder, None


def _header_bomb(trial: Trial, _: Path) -> tuple[Path, Any]:
    """A header that is said to be huge, or whose tensor is."""
    huge = trial.random.choice((2**30, 2**40, 2**62))
    if trial.random.random() < 0.5:
        return _safetensors(_hugging_face(trial), b"{}", b"", huge)
    tensor = {"dtype": "F32", "shape": [huge, 4], "data_offsets": [0, huge * 16 % 2**63]}
    return _safetensors(_hugging_face(trial), json.dumps({"gpt_neox.embed_in.weight": tensor}).encode(), bytes(64))


def _overlapping(trial: Trial, _: Path) -> tuple[Path, Any]:
    """Two tensors of the same bytes, or a hole between two."""
    second = trial.random.choice((0, 8, 24))
    tensors = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [second, second + 16]},
    }
    return _safetensors(_hugging_face(trial), json.dumps(tensors).encode(), bytes(second + 16))


def _outside(trial: Trial, _: Path) -> tuple[Path, Any]:
    """An index whose shard lies elsewhere."""
    folder = _hugging_face(trial)
    secret = trial.folder / "elsewhere.safetensors"
    secret.write_bytes(b"")
    names = ("../elsewhere.safetensors", str(secret), "..", "", ".", "a/../../elsewhere.safetensors", "\0")
    index = {"weight_map": {"gpt_neox.embed_in.weight": trial.random.choice(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder, None

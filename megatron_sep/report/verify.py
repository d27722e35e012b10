"""`verify`: whether weights compute the same whichever way they are used, and whether their files are as written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_sep.attention.rules import LayerRules
from megatron_sep.attention.words import in_words
from megatron_sep.convert.check import check_ids, check_length, exported_rules
from megatron_sep.data.content import sum_of
from megatron_sep.data.separator_notes import shown_samples
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.errors import UserError
from megatron_sep.evaluate.ways import Left, Ways
from megatron_sep.parallel.topology import Topology
from megatron_sep.weights.export import export_rules
from megatron_sep.weights.open_source import OpenedSource, open_source
from megatron_sep.weights.sealed import CheckpointError, describe, finished_checkpoints, versions_here, written_by

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the spread (standard deviation) of the logits, between ways in fp32."""
_SHORTEST = 8
"""Tokens of a text that tell anything."""
_SAMPLE = "The cat sat on the mat, and slept. It was warm; was it not? Yes!\nThen it rained.\n"


class VerifyError(UserError):
    """Weights or a text that cannot be verified as asked."""


@dataclass(frozen=True)
class Subject:
    """Weights that are opened, with their tokenizer and their rules."""

    source: OpenedSource
    tokenizer: Tokenizer
    rules: LayerRules


def verify(path: Path, text: Path | None, topology: Topology) -> Iterator[str]:
    """One line a finding; what is not as it should be begins with `!`. Raises what opening ``path`` raises."""
    try:
        subject = _open(path)
    except CheckpointError as error:
        yield f"! files: {error}"
        return
    source = subject.source
    yield f"{source.place}: {source.config.num_layers} layers, vocabulary {source.vocab_size:,}"
    yield from _files(source)
    yield from _tokenizer(subject)
    yield from _patterns(subject)
    ids, whose = _ids(subject, text)
    separators = int(subject.rules.separators.landmarks(ids).sum())
    yield f"text: {ids.shape[1]} tokens of {whose}, {separators} of them separators"
    yield from _masks(subject, ids)
    yield from _ways(Ways(source, subject.tokenizer, subject.rules, ids.to(topology.device), topology))


def _open(path: Path) -> Subject:
    written = finished_checkpoints(path / "checkpoints")
    source = open_source(written[-1] if written else path)  # of a run the newest, whole or not
    if source.tokenizer is None:
        raise VerifyError(f"{path}: has no tokenizer.json or tokenizer.model; copy it there")
    tokenizer = load_tokenizer(source.tokenizer, source.eod)
    rules = LayerRules.of(source.attention, source.config.num_layers, tokenizer)
    return Subject(source, tokenizer, rules.counting(source.config.position, tokenizer))


def _files(source: OpenedSource) -> Iterator[str]:
    """Opening has read every name and shape, and of a checkpoint every sum."""
    if not source.own:
        yield "files: every weight is there in its shape; such a directory has no sums to hold its files against"
        return
    count = sum(1 for file in source.place.iterdir() if file.is_file())
    yield f"files: {count}, each with the SHA-256 that it was written with"
    then, now = written_by(source.place), versions_here()
    others = [
        f"{name} {version}, here {now.get(name, 'none')}" for name, version in then.items() if now.get(name) != version
    ]
    yield f"versions: {'; '.join(others) or 'those that wrote it'}"


def _tokenizer(subject: Subject) -> Iterator[str]:
    source, tokenizer = subject.source, subject.tokenizer
    mark = "" if tokenizer.vocab_size <= source.vocab_size else "! "
    yield f"{mark}tokenizer: {tokenizer.path}, {tokenizer.vocab_size:,} ids for {source.vocab_size:,} rows"
    if source.own:
        then = (describe(source.place).contents or {}).get("tokenizer.path")
        same = then is None or then == sum_of([tokenizer.path])
        known = "whether it is the one of training was not written down" if then is None else "the one of training"
        yield f"  {known}" if same else "! tokenizer: its content is not that of training; bring that one back"
    if tokenizer.decode(tokenizer.encode(_SAMPLE)) != _SAMPLE:
        yield "  a text does not come back from it as it was: it normalizes"


def _patterns(subject: Subject) -> Iterator[str]:
    ids = subject.rules.separators.separator_ids
    shown = " ".join(repr(subject.tokenizer.decode([token])) for token in ids[:20])
    more = f" and {len(ids) - 20} more" if len(ids) > 20 else ""
    yield f"separators: {f'{shown}{more}' if ids else 'none'}"
    outside = [token for token in ids if token >= subject.source.vocab_size]
    if outside:
        yield f"! separators: {outside} are beyond the {subject.source.vocab_size:,} rows of the vocabulary"
    different = dict.fromkeys(in_words(pattern) for pattern in subject.rules.patterns)
    yield from (f"  a layer sees {words}" for words in different)


def _ids(subject: Subject, text: Path | None) -> tuple[Tensor, str]:
    """Ids [1, T]: of a file, else of the data of the run, else of a text that the program has. Raises VerifyError."""
    source = subject.source
    rules = export_rules(source)
    if text is not None:
        return _of_file(subject, text, check_length(source, rules)), str(text)
    if source.own:
        config = describe(source.place).config
        try:
            samples = shown_samples(config.data, config.model.sequence_length, subject.tokenizer)
            row = torch.as_tensor(samples.take(0, 1).ids[0, : check_length(source, rules)])
            return row[None].long(), "the run's training data"
        except (UserError, OSError):  # data that are elsewhere by now
            pass
    return check_ids(source, rules), "a text of this program: the run's data are not here"


def _of_file(subject: Subject, text: Path, length: int) -> Tensor:
    try:
        ids = subject.tokenizer.encode(text.read_text(encoding="utf-8"))[:length]
    except (OSError, UnicodeDecodeError) as error:
        raise VerifyError(f"--text {text}: cannot be read: {error}; name a text file") from error
    if len(ids) < _SHORTEST:
        raise VerifyError(f"--text {text}: has {len(ids)} tokens; {_SHORTEST} at least tell something")
    return torch.tensor([ids])


def _masks(subject: Subject, ids: Tensor) -> Iterator[str]:
    """Of training and of an export's own settings, pair by pair."""
    exported = exported_rules(export_rules(subject.source), subject.source.config.num_layers)
    both = zip(subject.rules.plans(ids), exported.plans(ids), strict=True)
    pairs = [(ours.dense(), theirs.dense()) for ours, theirs in both]
    wrong = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    visible = sum(int(ours.sum()) for ours, _ in pairs)
    yield f"{'! ' if wrong else ''}masks: {wrong} pairs differ between training and export, {visible:,} are visible"


def _ways(ways: Ways) -> Iterator[str]:
    expected = ways.trained()
    spread = float(expected.std())
    yield f"logits of the training mask in fp32: spread {spread:.3g}; largest difference of a logit by"
    if not bool(torch.isfinite(expected).all()):
        yield "! the training mask: a logit is no number; the weights are broken"
        return
    for names, compute in ways.others().items():
        found = compute()
        if isinstance(found, Left):
            yield f"  {names}: left out: {found.why}"
            continue
        for name, logits in zip(names.split(", "), found, strict=True):
            yield _compared(name, logits - expected, spread)


def _compared(name: str, difference: Tensor, spread: float) -> str:
    largest = float(difference.abs().max())
    at = int(difference.abs().amax(1).argmax())
    within = largest <= TOLERANCE * spread  # false for NaN
    where = "" if within else f", at token {at}; {TOLERANCE:g} of the spread are allowed"
    return f"{'  ' if within else '! '}{name}: {largest:.2e}, {largest / spread:.1e} of the spread{where}"

"""What `generate` runs: a loaded model under a pattern, and prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.config.load import read_tree
from megatron_sep.config.schema import AttentionConfig
from megatron_sep.errors import UserError
from megatron_sep.generate.attach import Attachment, attach
from megatron_sep.generate.cache import SepCache
from megatron_sep.generate.decode import Decoder
from megatron_sep.generate.load import Loaded, load
from megatron_sep.generate.sampler import Sampling, cache_lines, stream
from megatron_sep.kernels.operation import announced_afterwards
from megatron_sep.parallel.device import current_device


class SessionError(UserError):
    """Options of `generate` that do not go together."""


@dataclass(frozen=True)
class Session:
    """A model that is attached to its policies."""

    loaded: Loaded
    attachment: Attachment

    def shown(self, prompts: Sequence[str], sampling: Sampling, cache: SepCache) -> Iterator[str]:
        """Prompts with their continuations: one in pieces as they come, several one below the other.

        ``cache`` is an empty one of the attachment, which holds them afterwards.
        """
        decoder = Decoder(self.loaded.model, cache)
        pieces = stream(decoder, self.loaded.tokenizer, prompts, sampling)
        if len(prompts) == 1:
            with announced_afterwards():
                yield prompts[0]
                yield from (piece for _, piece in pieces)
                yield "\n"
            return
        whole = list(prompts)
        for index, piece in pieces:
            whole[index] += piece
        yield from (f"== {number}\n{text}\n" for number, text in enumerate(whole, 1))

    def cache_lines(self, cache: SepCache) -> str:
        """What the cache of texts held, and a word where they were longer than the model knows."""
        policy, trained = self.attachment.policies[0], self.loaded.trained_length
        lines = cache_lines(cache, policy.mean_size if isinstance(policy, StreamingPattern) else None)
        if cache.seen > trained and getattr(policy, "positions", "text") == "text":
            lines += f"\nlonger than the {trained:,} tokens of training: --streaming keeps positions inside the cache"
        return lines


def read_prompts(given: Sequence[str], file: Path | None) -> list[str]:
    """Those of the command line and, one a line, those of a file. Raises SessionError where there are none."""
    try:
        lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SessionError(f"--prompts {file}: cannot be read: {error}; pass a text file, a prompt a line") from error
    found = [*given, *(line for line in lines if line.strip())]
    if not found:
        raise SessionError("no prompt: pass --prompt TEXT or --prompts FILE")
    for text in found:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8
            raise SessionError(f"--prompt {text[:80]!r}: is no UTF-8 from character {error.start} on") from error
    return found


def open_session(
    path: Path, attention: Path | None, streaming: str | None, positions: str | None, prefill: str | None = None
) -> Session:
    """Open a model under its own pattern, that of a YAML file, or with a cache of bounded size ``a,s,w,c``.

    ``positions`` are those of such a cache, None: inside it; ``prefill`` how it reads a prompt, None: compressed.
    Raises SessionError for options that do not go together, before the model is read, and what opening it raises.
    """
    asked = None if attention is None else _attention(attention)
    bounded = _bounded(streaming, positions, prefill)
    loaded = load(path, current_device())
    rules = loaded.rules(asked or loaded.attention)
    if bounded is None:
        return Session(loaded, attach(loaded.model, list(rules.patterns), document_end=rules.document_end))
    ids = rules.separators.separator_ids or loaded.rules(_default_separators()).separators.separator_ids
    policy = replace(bounded, separator_ids=ids)
    return Session(loaded, attach(loaded.model, policy, document_end=rules.document_end))


def _bounded(streaming: str | None, positions: str | None, prefill: str | None) -> StreamingPattern | None:
    """The sizes of ``--streaming``, without separators yet; None where it is not given. Raises SessionError."""
    if streaming is None:
        for option, value in (("--positions", positions), ("--prefill", prefill)):
            if value is not None:
                raise SessionError(f"{option} {value}: is of a cache of bounded size; pass --streaming a,s,w,c too")
        return None
    try:
        sizes, modes = _sizes(streaming), {"positions": positions or "cache", "prefill": prefill or "compressed"}
        return StreamingPattern(*sizes, **modes)  # type: ignore[arg-type]
    except ValueError as error:
        raise SessionError(f"--streaming {streaming}: {error}") from error


def _default_separators() -> AttentionConfig:
    return AttentionConfig(window=1, separators="default")


def _attention(path: Path) -> AttentionConfig:
    tree = read_tree(path)
    if not isinstance(tree.get("attention"), dict):
        raise SessionError(f"{path}: has no section `attention`; configs/attention/ has examples")
    try:
        return AttentionConfig.model_validate(tree["attention"])
    except ValueError as error:
        raise SessionError(f"{path}: {error}") from error


def _sizes(text: str) -> tuple[int, int, int, int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError("pass four numbers a,s,w,c: sinks, separators, window, capacity")
    a, s, w, c = (int(part) for part in parts)
    return a, s, w, c

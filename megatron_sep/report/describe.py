"""A run in words, before it starts: the resolved configuration, the size of the model, what each layer sees."""

from itertools import groupby

from megatron_sep.attention.annealing import Annealing
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.config import RunConfig, to_yaml
from megatron_sep.config.size import ModelSize
from megatron_sep.data.resolved import Resolved, resolve
from megatron_sep.data.separator_notes import separator_notes, shown_samples
from megatron_sep.data.tokenizer import TokenizerError
from megatron_sep.errors import UserError

SHOWN_IDS = 20


def describe(config: RunConfig) -> str:
    """YAML of every setting, then parameters and patterns; needs no GPU, and says so where the tokenizer is missing."""
    text = [to_yaml(config).rstrip(), "", *_size_and_layers(config)]
    return "\n".join(text)


def _size_and_layers(config: RunConfig) -> list[str]:
    try:
        resolved = resolve(config.tokenizer, config.model, config.attention)
    except TokenizerError as error:
        return [f"# parameters and separators are not known yet: {error}"]
    size = ModelSize(config.model, resolved.vocab_size)
    outside = size.parameters - size.embedding_parameters
    return [
        f"# {size.parameters:,} parameters, {outside:,} without the embeddings; vocabulary {resolved.vocab_size:,}",
        *(f"# {line}" for line in layer_lines(resolved.rules.patterns)),
        *_annealing_lines(config, resolved),
        *_separator_lines(config, resolved),
    ]


def _separator_lines(config: RunConfig, resolved: Resolved) -> list[str]:
    """What the separators hold of the training data, where it is there already."""
    if not resolved.rules.separators.separator_ids:
        return []
    try:
        samples = shown_samples(config.data, config.model.sequence_length, resolved.tokenizer)
        return [f"# {note}" for note in separator_notes(config.attention, resolved, samples)]
    except UserError as error:
        return [f"# what the separators hold of the data is not known yet: {error}"]


def _annealing_lines(config: RunConfig, resolved: Resolved) -> list[str]:
    """The windows of an annealing and the steps they begin at."""
    stages = Annealing(resolved.rules, config.attention.anneal, config.checkpoint.init_step).stages()
    shown = ", ".join(f"{window} from step {step}" for step, window in stages.items())
    return [f"# window in training: {shown}"] if stages else []


def layer_lines(patterns: tuple[AttentionPattern, ...]) -> list[str]:
    """One line for each run of layers with the same pattern."""
    lines = []
    for pattern, group in groupby(enumerate(patterns), key=lambda item: item[1]):
        layers = [number for number, _ in group]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"{name}: {in_words(pattern)}")
    return lines


def in_words(pattern: AttentionPattern) -> str:
    """What a query sees under a pattern."""
    if pattern.window is None:
        return "every earlier token"
    seen = [f"the last {pattern.window} tokens"]
    if pattern.sinks:
        seen.append(f"the first {pattern.sinks}")
    if pattern.separator_ids:
        seen.append(f"every separator ({_ids_in_words(pattern.separator_ids)})")
    if pattern.stride:
        seen.append(f"every {pattern.stride}th token")
    return ", ".join(seen)


def _ids_in_words(ids: tuple[int, ...]) -> str:
    """All of a list that a reader takes in; of a longer one how many, and the first."""
    if len(ids) <= SHOWN_IDS:
        return f"ids {', '.join(map(str, ids))}"
    return f"{len(ids)} ids: {', '.join(map(str, ids[:SHOWN_IDS]))} ..."

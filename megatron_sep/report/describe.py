"""A run in words, before it starts: the resolved configuration, the size of the model, what each layer sees."""

from megatron_sep.attention.annealing import Annealing
from megatron_sep.attention.layers import layer_patterns
from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.words import layer_lines
from megatron_sep.config import RunConfig, Sketch, to_yaml
from megatron_sep.config.size import ModelSize
from megatron_sep.data.resolved import Resolved, resolve
from megatron_sep.data.separator_notes import separator_notes, shown_samples
from megatron_sep.data.tokenizer import TokenizerError
from megatron_sep.errors import UserError
from megatron_sep.weights.sealed import versions_here


def describe(sketch: Sketch) -> str:
    """YAML of every setting, then parameters, patterns and versions, and what training still needs; needs no GPU."""
    text = [to_yaml(sketch.config, without=sketch.missing).rstrip(), "", *_size_and_layers(sketch), _versions_line()]
    needed = ", ".join(f"{place} (GPT-NeoX's {key})" if key else place for place, key in sketch.missing.items())
    return "\n".join([*text, *([f"# training still needs {needed}"] if needed else [])])


def _versions_line() -> str:
    return "# with " + ", ".join(f"{name} {version}" for name, version in versions_here().items())


def _size_and_layers(sketch: Sketch) -> list[str]:
    """Parameters and patterns, as far as they are known; nothing where the model itself is not described."""
    config = sketch.config
    if any(place.startswith("model.") and place != "model.sequence_length" for place in sketch.missing):
        return []
    if "tokenizer.path" in sketch.missing:
        return _without_tokenizer(config, "tokenizer.path is missing")
    try:
        resolved = resolve(config.tokenizer, config.model, config.attention)
    except TokenizerError as error:
        return _without_tokenizer(config, str(error))
    size = ModelSize(config.model, resolved.vocab_size)
    outside = size.parameters - size.embedding_parameters
    return [
        f"# {size.parameters:,} parameters, {outside:,} without the embeddings; vocabulary {resolved.vocab_size:,}",
        *(f"# {line}" for line in layer_lines(resolved.rules.patterns)),
        *_annealing_lines(config, resolved),
        *([] if "data.path" in sketch.missing else _separator_lines(config, resolved)),
    ]


def _without_tokenizer(config: RunConfig, why: str) -> list[str]:
    """What is known without the ids of separators and, where the model does not say it, the vocabulary."""
    vocab = config.model.vocab_size
    size = ModelSize(config.model, vocab or 0)
    counted = f"{size.parameters:,} parameters" if vocab else f"{size.parameters:,} parameters without the embeddings"
    attention = config.attention
    pattern = AttentionPattern(attention.window, attention.sinks, attention.separator_ids, attention.stride)
    named = [f"# separators {attention.separators} are looked up in the tokenizer"] if attention.separators else []
    return [
        f"# {counted}; ids of separators and the vocabulary are not known yet: {why}",
        *(f"# {line}" for line in layer_lines(layer_patterns(pattern, config.model.num_layers, attention.full_layers))),
        *named,
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

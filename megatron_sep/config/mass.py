"""Whether it can be told what attention pays to first tokens, separators, neighbours and the rest; torch-free."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sep.config.schema import AttentionConfig, ModelConfig, ParallelConfig

_OF_FULL_ATTENTION = (3, 64)


def first_and_near(attention: "AttentionConfig") -> tuple[int, int]:
    """How many first keys and how many neighbours count as such: the pattern's; of full attention SepLLM n=64's."""
    return _OF_FULL_ATTENTION if attention.window is None else (attention.sinks, attention.window)


def mass_mistakes(
    every: int | None, model: "ModelConfig", attention: "AttentionConfig", parallel: "ParallelConfig"
) -> list[str]:
    """Why ``metrics.attention_mass_every`` cannot be as it is."""
    behind = sum(first_and_near(attention))
    checks = (
        (parallel.context > 1, f"under parallel.context={parallel.context} no rank has all keys of its queries"),
        (
            model.self_adjusting_softmax is not None,
            "the weights of model.self_adjusting_softmax do not add up to 1",
        ),
        (
            model.sequence_length <= behind,
            f"no query of model.sequence_length={model.sequence_length} stands behind {behind} first and near keys",
        ),
    )
    if every is None:
        return []
    return [f"metrics.attention_mass_every={every}: {why}; set it to null" for wrong, why in checks if wrong]

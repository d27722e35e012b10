"""What the layers of a model may have for policies, and which of them go together."""

from collections.abc import Sequence
from typing import Any

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.errors import UserError
from megatron_sep.generate.chunk import TokenPolicy
from megatron_sep.generate.policies import ScorePolicy

LayerPolicy = TokenPolicy | ScorePolicy | tuple[TokenPolicy, ...]
"""One policy for all heads of a layer, or one for each of its key heads."""


class CacheError(UserError):
    """Something that a cache cannot do, or a text that it cannot take."""


def head_policies(
    pattern: AttentionPattern, heads: int, query_heads: int, key_heads: int
) -> tuple[AttentionPattern, ...]:
    """Naive head-wise windows (the paper's Table 9): ``heads`` query heads see ``pattern``, the others everything.

    One pattern for each key head. Raises CacheError where a group of query heads would be split.
    """
    group = query_heads // key_heads
    if heads % group or not 0 <= heads <= query_heads:
        raise CacheError(
            f"heads={heads} of {query_heads}: the cache keeps keys for groups of {group} query heads; "
            f"choose a multiple of {group} from 0 to {query_heads}"
        )
    sparse = heads // group
    return (pattern,) * sparse + (AttentionPattern(),) * (key_heads - sparse)


def first_policy(policies: Sequence[LayerPolicy]) -> Any:
    """Of the first layer and key head."""
    return policies[0][0] if isinstance(policies[0], tuple) else policies[0]


def check_positions(policies: Sequence[LayerPolicy]) -> None:
    """A model rotates a token by one position in all its layers. Raises CacheError for policies that differ in it."""
    flat = {part for policy in policies for part in (policy if isinstance(policy, tuple) else (policy,))}
    modes = sorted({policy.positions for policy in flat})
    if len(modes) > 1 or (modes == ["frozen"] and len(flat) > 1):
        raise CacheError(
            f"positions {' and '.join(modes)} of {len(flat)} different policies: a token has one position in all "
            "layers; pass positions='text', or one policy for every layer"
        )


def check_scored(policies: Sequence[LayerPolicy], document_end: int | None) -> None:
    """Raises CacheError for what policies that look at attention do not do."""
    for policy in policies:
        if isinstance(policy, tuple) and any(isinstance(part, ScorePolicy) for part in policy):
            raise CacheError(
                f"{policy}: a tuple takes an AttentionPattern for each key head; pass one policy for the layer"
            )
        if isinstance(policy, ScorePolicy) and document_end is not None:
            raise CacheError(
                f"document_end={document_end} with {policy}: it knows no documents; pass document_end=None, and each "
                "document as a text of its own"
            )

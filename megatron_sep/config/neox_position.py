"""What GPT-NeoX's and SepLLM's keys say of positions and of the softmax, as values of ours."""

from collections.abc import Iterator
from typing import Any

from megatron_sep.config.neox_attention import NAMED_SEPARATORS
from megatron_sep.config.neox_rules import NeoxError, Tree

_SOFTMAX = ("use_sa_softmax", "use_sa_softmax_no_deno")


def position(values: Tree) -> Tree:
    """Rotary, ALiBi, or bilevel with one of them between the segments; `pos_emb` itself is checked by the table."""
    between = values.get("pos_emb", "rotary")
    if not values.get("use_bipe"):
        return {"model.position": {"kind": between}} if between == "alibi" else {}
    found: Tree = {"kind": "bipe", "segments": between, **_segment_ends(values)}
    length = values.get("max_position_embeddings", values.get("seq_length"))
    return {"model.position": found if length is None else found | {"length": length}}


def _segment_ends(values: Tree) -> Tree:
    if not values.get("bipe_seps"):
        raise NeoxError("BiPE_seps: is needed where USE_BiPE is on: the ids of the tokens that end a segment")
    ids = values["bipe_seps"]
    if frozenset(ids) in NAMED_SEPARATORS:
        return {"separators": NAMED_SEPARATORS[frozenset(ids)]}
    return {"separators": [], "separator_ids": ids}


def softmax(values: Tree) -> Tree:
    """The self-adjusting softmax, with or without its denominator."""
    asked = [key for key in _SOFTMAX if values.get(key)]
    if len(asked) == 2:
        raise NeoxError("USE_SA_SOFTMAX and USE_SA_SOFTMAX_NO_DENO: are two kinds of softmax; turn one of them on")
    if not asked:
        return {}
    found: dict[str, Any] = {"denominator": asked == ["use_sa_softmax"]}
    if found["denominator"]:
        names = {"sa_numerator_bias": "numerator_bias", "sa_denominator_bias": "denominator_bias"}
        found |= {ours: float(values[theirs]) for theirs, ours in names.items() if theirs in values}
    return {"model.self_adjusting_softmax": found}


def remarks(values: Tree) -> Iterator[str]:
    """Where the authors' code computes something else than the method."""
    if values.get("use_sa_softmax"):
        yield "USE_SA_SOFTMAX: the denominator's bias is added once, the authors' code adds it twice"
    if any(values.get(key) for key in _SOFTMAX):
        yield "USE_SA_SOFTMAX: goes with every attention pattern, least and largest score are those of the visible keys"

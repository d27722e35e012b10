"""What GPT-NeoX's and SepLLM's keys say of who sees whom, as values of ours."""

from collections.abc import Iterator
from typing import Any

from megatron_sep.config.neox_rules import ArchitectureError, NeoxError, Tree

NAMED_SEPARATORS = {
    frozenset((15, 13, 32, 2, 28, 27, 209, 186, 187)): "default",
    frozenset((13, 11, 30, 0, 26, 25, 198, 220, 128000)): "llama-3-training-free",
}
"""Lists of ids that have a name: the nine of the paper in GPT-NeoX's tokenizer, and the authors' for Llama-3."""
_LLAMA_3_BEGIN = 128000
_FULL_KINDS = ("global", "flash")
_MOST_LAYERS = 10_000
_NO_SEPARATOR = -1
"""What SepLLM's files write where there are none."""


def attention(values: Tree) -> Tree:
    """The pattern of SepLLM's keys, or GPT-NeoX's sliding window; files without either train with full attention."""
    kinds = _kinds(values)
    if "init_tok_max_idx" not in values or values["use_original_full_atten"]:
        return _sliding(values, kinds)
    if "sliding_window_width" in values:
        raise NeoxError(
            f"sliding_window_width={values['sliding_window_width']}: stands beside SepLLM's keys, which have a window "
            "of their own; leave one of them out"
        )
    found: Tree = {"attention.sinks": values["init_tok_max_idx"] + 1, **_windows(values)}
    if values["use_fixed_sep_intervals"]:
        needed = _needed(values, "fixed_sep_intervals_list", "USE_FIXED_SEP_INTERVALs is on")
        return found | {"attention.stride": _one_of("fixed_sep_intervals_list", needed)}
    return found if values["streamingllm"] else found | _separators(values)


def _kinds(values: Tree) -> list[str]:
    """The kind of each layer's attention, as far as attention_config tells. Raises ArchitectureError for others."""
    config = values.get("attention_config") or [[["global"], values.get("num_layers", 1)]]
    layers = values.get("num_layers", 1)
    repeated = [(group, layers if times == "all" else times) for group, times in config]
    named = sum(len(group) * times for group, times in repeated)
    if named > _MOST_LAYERS:
        raise NeoxError(
            f"num_layers and attention_config name {named:,} layers; no model has more than {_MOST_LAYERS:,}"
        )
    kinds = [kind for group, times in repeated for kind in group * times]
    other = sorted(set(kinds) - set(_FULL_KINDS))
    if other:
        raise ArchitectureError(
            f"attention_config names {', '.join(other)}: layers here are of attention to every earlier token; known "
            f"are {' and '.join(_FULL_KINDS)}"
        )
    return kinds


def _sliding(values: Tree, kinds: list[str]) -> Tree:
    """Flash layers slide the window, as Mistral's do, the query among its tokens; global ones see everything."""
    width = values.get("sliding_window_width")
    if width is None or "flash" not in kinds:
        return {"attention.window": None}
    return {"attention.window": width, "attention.full_layers": [i for i, kind in enumerate(kinds) if kind == "global"]}


def remarks(values: Tree) -> Iterator[str]:
    """Where a window or a separator is not what its key seems to say."""
    others = ("use_original_full_atten", "use_fixed_sep_intervals", "streamingllm")
    if _LLAMA_3_BEGIN in values.get("separator_token_ids", ()) and not any(values.get(key) for key in others):
        yield (
            f"separator_token_ids: {_LLAMA_3_BEGIN} begins a text in Llama-3's tokenizer, where the paper has the tab, "
            "197; as a separator it stays visible wherever it stands, at the first place of a text as a sink does"
        )
    width = values.get("sliding_window_width")
    if width is None:
        return
    if "flash" in _kinds(values):
        yield (
            f"sliding_window_width: {width} tokens, the query among them, as transformers counts; GPT-NeoX's flash "
            "attention sees one more"
        )
    else:
        yield "sliding_window_width: without effect, as in GPT-NeoX: only flash layers of attention_config slide"


def _windows(values: Tree) -> Tree:
    """One window and the layers that see everything, from one size or a size a layer."""
    if not values["use_prefill_local_win_sizes_wrt_layers"]:
        return {"attention.window": values["prefill_local_window_size"]}
    sizes = _needed(values, "prefill_loc_win_size_list", "USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS is on")
    layers = values.get("num_layers", values.get("layer_num", len(sizes)))
    if len(sizes) != layers:
        raise NeoxError(f"prefill_loc_win_size_list has {len(sizes)} sizes, num_layers={layers}")
    length = values.get("seq_length", 2048)
    full = [i for i, size in enumerate(sizes) if size >= length]
    if len(full) == len(sizes):
        return {"attention.window": None}
    rest = [size for size in sizes if size < length]
    return {"attention.window": _one_of("prefill_loc_win_size_list", rest), "attention.full_layers": full}


def _needed(values: Tree, key: str, why: str) -> Any:
    if key not in values:
        raise NeoxError(f"{key}: is needed where {why}")
    return values[key]


def _one_of(key: str, sizes: list[int]) -> int:
    if len(set(sizes)) != 1:
        raise NeoxError(f"{key}={sizes}: layers have one and the same size or see everything")
    return sizes[0]


def _separators(values: Tree) -> Tree:
    ids = _needed(values, "separator_token_ids", f"SepLLM's attention is asked for; [{_NO_SEPARATOR}] means none")
    if frozenset(ids) in NAMED_SEPARATORS:
        return {"attention.separators": NAMED_SEPARATORS[frozenset(ids)]}
    return {"attention.separator_ids": [i for i in ids if i not in (None, _NO_SEPARATOR)]}

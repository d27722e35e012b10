"""Every table and figure of the paper, in its order."""

from collections.abc import Sequence

from megatron_sep.reproduce import (
    cache_sizes,
    evolution,
    losses,
    needle,
    post_training,
    retention,
    sparsity,
    speed,
    streams,
    tasks,
)
from megatron_sep.reproduce.attention_mass import figure2, head_map
from megatron_sep.reproduce.item import TRAIN, Item, Make, ReproduceError
from megatron_sep.reproduce.mask_figure import figure3
from megatron_sep.reproduce.policies import MEASURE, compared
from megatron_sep.reproduce.separator_choice import table16
from megatron_sep.reproduce.streams import streamed

_RUNS = f"--runs DIR, with what {TRAIN} makes"
_POLICIES = f"--runs DIR, with what `{MEASURE}` writes"
_NOTHING = "nothing"
_LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"
_MAPS = f"--checkpoint PATH of any decoder (the paper's: {_LLAMA}), or --runs DIR"
_TRAINING_FREE = (
    f"a harness of tasks on a model of transformers that `attach` gave configs/attention/sep-n256.yaml: {_LLAMA}"
)
_TEXT = "--text FILE with --checkpoint PATH or --runs DIR"
_SIZES = f"nothing for r.KV; {_TEXT} for perplexity and time"
_STREAM = "perplexity and time of that backbone: table5 with --checkpoint"
_NEEDLE = f"--runs DIR, with what `{needle.MEASURE}` writes"
_LLAMA_NEEDLE = f"megatron_sep eval {_LLAMA} --needle TEXT --attention YAML, the YAML with window 2048 and full layers"

ITEMS = (
    Item(
        "table1", "Table 1: training-free, GSM8K-CoT and MMLU", "needs 8B", _TRAINING_FREE, retention.table1,
        "the accuracies; its shares of kept keys are arithmetic and here",
    ),
    Item(
        "table2", "Table 2: from scratch, downstream", "small", f"{_RUNS}; for tasks what `{tasks.MEASURE}` writes",
        losses.table2,
    ),
    Item(
        "table3", "Table 3: FLOPs and attention map ratios", "exact", f"{_NOTHING}; with --runs DIR also those of runs",
        sparsity.table3,
    ),
    Item("table4", "Table 4: PG19 to 4M tokens", "small", _TEXT, streamed(streams.TABLE_4, "table4")),
    Item(
        "table5", "Table 5: streaming perplexity, time and cache", "exact", _SIZES,
        streamed(streams.TABLE_5, "table5", cache_sizes.TABLE_5),
    ),
    Item(
        "table6", "Table 6: separator capacity", "exact", _SIZES,
        streamed(streams.TABLE_6, "table6", cache_sizes.TABLE_6),
    ),
    Item(
        "table7", "Table 7: window and capacity", "exact", _SIZES,
        streamed(streams.TABLE_7, "table7", cache_sizes.TABLE_7),
    ),
    Item(
        "table8", "Table 8: first tokens and positions", "exact", _SIZES,
        streamed(streams.TABLE_8, "table8", cache_sizes.TABLE_8),
    ),
    Item(
        "table9", "Table 9: windows in some heads", "small", f"{_NOTHING} for r.KV; {_POLICIES}",
        compared("windows in", arithmetic=retention.table9), "the accuracies of MMLU",
    ),
    Item("table10", "Table 10: training speed", "small", _RUNS, speed.table10),
    Item("table11", "Table 11: other architectures", "exact", _NOTHING, cache_sizes.TABLE_11, _STREAM),
    Item("table12", "Table 12: other sizes", "exact", _NOTHING, cache_sizes.TABLE_12, _STREAM),
    Item("table13", "Table 13: Falcon-40B", "exact", _NOTHING, cache_sizes.TABLE_13, _STREAM),
    Item(
        "table14", "Table 14: fine-tuned base and instruct models", "needs 8B",
        "LongAlpaca as JSON lines, and `megatron_sep train configs/reproduce/8b/longalpaca-n256.yaml`; for the "
        "instruct model with train.steps=200, checkpoint.init_from and tokenizer.path",
    ),
    Item(
        "table15", "Table 15: H2O, SnapKV, PyramidKV", "small", _POLICIES,
        compared("H2O", "SnapKV", "PyramidKV"), "the accuracies of GSM8K-CoT",
    ),
    Item("table16", "Table 16: choice of separators", "small", _TEXT, table16, "the accuracies of GSM8K-CoT"),
    Item(
        "table17", "Table 17: FixLLM", "small", f"{_NOTHING} for r.KV; {_POLICIES}",
        compared("FixLLM", arithmetic=retention.table17), "the accuracies of GSM8K-CoT and MMLU",
    ),
    Item("figure1", "Figure 1: loss at equal FLOPs and equal time", "small", _RUNS, losses.figure1),
    Item("figure2", "Figure 2: attention to separators, by layer", "small", _MAPS, figure2),
    Item("figure3", "Figure 3: the mask of a sentence", "exact", _NOTHING, figure3),
    Item("figure4", "Figure 4: the four blocks of the cache", "exact", _NOTHING, evolution.figure4),
    Item("figure5", "Figure 5: loss curves, from scratch", "small", _RUNS, losses.figure5),
    Item("figure6", "Figure 6: loss curves, post-training", "small", _RUNS, post_training.figure6),
    Item("figure7", "Figure 7: n and Size_run; equations 3 and 4", "exact", _NOTHING, evolution.figure7),
    Item("figure8", "Figure 8: needle, StreamingLLM, Pythia-160m", "small", _NEEDLE,
         needle.heat_maps("figure8", "StrmLLM n=64")),
    Item("figure9", "Figure 9: needle, SepLLM H/T, Pythia-160m", "small", _NEEDLE,
         needle.heat_maps("figure9", "SepLLM n=64, H/T", "StrmLLM n=64", "Vanilla")),
    Item("figure10", "Figure 10: needle, Llama-3-8B, a=4", "needs 8B", f"`{_LLAMA_NEEDLE} [0, 1, -2, -1], sinks 4`"),
    Item("figure11", "Figure 11: needle, Llama-3-8B, a=32", "needs 8B", f"`{_LLAMA_NEEDLE} [0, 1, -2, -1], sinks 32`"),
    Item("figure12", "Figure 12: attention map, layer 0", "small", _MAPS, head_map("figure12", 0)),
    Item("figure13", "Figure 13: attention map, layer 1", "small", _MAPS, head_map("figure13", 1)),
    Item("figure14", "Figure 14: attention map, layer 2", "small", _MAPS, head_map("figure14", 2)),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[tuple[Item, Make]]:
    """Items by their names, or all of a kind that need nothing by ``exact``, with what makes each.

    Raises ReproduceError for one that is not there, or that this program does not make.
    """
    exact = [item.name for item in ITEMS if item.kind == "exact"]
    wanted = [name for given in names for name in (exact if given == "exact" else [given])]
    by_name = {item.name: item for item in ITEMS}
    strange = [name for name in wanted if name not in by_name]
    if strange:
        raise ReproduceError(
            f"reproduce {' '.join(strange)}: no such item; `megatron_sep reproduce --list` has them all"
        )
    return [(by_name[name], _maker(by_name[name])) for name in wanted]


def _maker(item: Item) -> Make:
    if item.make is None:
        raise ReproduceError(f"reproduce {item.name}: {item.title} is not made by this program; it needs {item.needs}")
    return item.make


def listing() -> str:
    """Every item, its kind, whether it is made here, and what it needs; a line each."""
    width = max(len(item.title) for item in ITEMS)
    return "\n".join(
        f"{item.name:9s} {item.kind:9s} {'made' if item.make else '-':5s} {item.title:{width}s}  {_about(item)}"
        for item in ITEMS
    )


def _about(item: Item) -> str:
    return f"needs {item.needs}" + (f"; not part of it: {item.rest}" if item.rest else "")

"""Items that read what runs left: of runs with known numbers, the tables have what follows from those."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.left_runs import STEPS, left_run

from megatron_sep.reproduce import losses, post_training, sparsity, speed
from megatron_sep.reproduce.item import Inputs, ReproduceError, Result
from megatron_sep.reproduce.items import ITEMS, chosen, listing
from megatron_sep.reproduce.needle import heat_maps
from megatron_sep.reproduce.policies import compared
from megatron_sep.reproduce.runs import comparison, find_runs
from megatron_sep.weights.identity import weights_sum

FULL = {"window": None}
SEP = {"window": 64, "sinks": 3, "separators": "default"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Vanilla, SepLLM n=64 that is 0.1 worse and twice as fast, H/T, another model, one that was post-trained."""
    left_run(tmp_path / "a", FULL)
    left_run(tmp_path / "b", SEP, gap=0.1, step_seconds=1.0, visible=0.25)
    left_run(tmp_path / "deep" / "er" / "c", SEP | {"full_layers": [0, -1]}, gap=0.05, visible=0.4)
    left_run(tmp_path / "d", SEP | {"window": 128}, model={"num_layers": 2})
    left_run(tmp_path / "e", SEP, gap=0.2, first=200, checkpoint={"init_from": "a", "init_step": 200})
    return tmp_path


def values(result: Result, table: int) -> dict[str, float | None]:
    return {row.name: row.ours for row in result.tables[table].rows}


def test_runs_are_found_by_their_settings(folder: Path) -> None:
    """The names are the paper's, whatever the folders are called; what does not compare is left out with the reason."""
    assert [run.label for run in find_runs(folder)] == [
        "Vanilla", "SepLLM n=64", "SepLLM n=128", "SepLLM n=64", "SepLLM n=64, H/T",
    ]  # fmt: skip
    left_run(folder / "f", SEP)
    left_run(folder / "h", {"window": 64, "sinks": 3}, last=200)
    left_run(folder / "g", SEP | {"window": 32}, train={"steps": 100, "global_batch_size": 8, "micro_batch_size": 8})
    found = comparison(folder)
    assert [run.label for run in found.all] == ["Vanilla", "StrmLLM n=64", "SepLLM n=64", "SepLLM n=64, H/T"]
    assert found.notes == (
        "d left out: another model than a.",
        "f left out: the settings of b.",
        "g left out: another train.steps than a.",
        "h is at step 200 of 400; its last loss is of that step.",
    )


def test_losses_at_equal_tokens_flops_and_time(folder: Path) -> None:
    """Ratios by hand: vanilla's loss is read from its curve where it has used as much."""
    result = losses.figure1(Inputs(folder))
    vanilla, sep, _ = comparison(folder).all
    steps = np.arange(20, STEPS + 1, 20)
    curve = 3 + 4 * np.exp(-steps / 100)
    cheaper = sep.flops_of_step() / vanilla.flops_of_step()
    assert 0.85 < cheaper < 0.95
    at_flops = np.interp(STEPS * cheaper, steps, curve)
    at_time = np.interp(STEPS / 2, steps, curve)
    last = curve[-1] + 0.1
    assert values(result, 0)["SepLLM n=64"] == pytest.approx(last)
    assert values(result, 1)["SepLLM n=64"] == pytest.approx(last / at_flops)
    assert values(result, 2)["SepLLM n=64"] == pytest.approx(last / at_time)
    assert values(losses.figure5(Inputs(folder)), 1)["SepLLM n=64"] == pytest.approx(last / curve[-1])
    assert list(result.figures) == ["figure1"]


def test_perplexity_speed_and_shares(folder: Path) -> None:
    """Tables 2, 10 and 3 of the same runs, beside the paper's numbers."""
    perplexity = losses.table2(Inputs(folder))
    assert values(perplexity, 1)["SepLLM n=64"] == pytest.approx(math.exp(0.1))
    assert perplexity.tables[1].rows[1].paper == pytest.approx(40.08 / 34.83)
    fast = speed.table10(Inputs(folder))
    assert values(fast, 0) == {"Vanilla": 2000, "SepLLM n=64": 1000, "SepLLM n=64, H/T": 2000}
    assert values(fast, 1)["SepLLM n=64"] == 8
    assert values(fast, 2)["SepLLM n=64"] == 2
    *_, shares, _, causal, whole = sparsity.table3(Inputs(folder)).tables
    assert [row.ours for row in shares.rows] == pytest.approx([100, 25, 40])
    by_name = {row.name: row.ours for row in whole.rows}
    expected = comparison(folder).others[0].flops_of_step() / comparison(folder).vanilla.flops_of_step()
    assert by_name["SepLLM n=64"] == pytest.approx(100 * expected, abs=0.01)
    assert causal.rows[1].ours is not None
    assert causal.rows[1].ours < by_name["SepLLM n=64"]


def test_post_training(folder: Path) -> None:
    """0.2 above vanilla from the switch to the end; below vanilla's loss at the switch from the step that follows."""
    result = post_training.figure6(Inputs(folder))
    assert values(result, 0) == {"SepLLM n=64": pytest.approx(0.2)}
    limit = 3 + 4 * math.exp(-2)
    steps = next(step for step in range(220, 401, 20) if 3.2 + 4 * math.exp(-step / 100) < limit)
    assert values(result, 1) == {"SepLLM n=64": pytest.approx((steps - 200) * 8 * 2048 / 1e6)}
    assert "step 200 of 400" in result.notes[0]


def test_a_folder_without_the_runs_names_what_makes_them(tmp_path: Path) -> None:
    """No folder, no runs, no vanilla, nothing beside it: each says what is missing."""
    with pytest.raises(ReproduceError, match="pass --runs DIR"):
        losses.figure5(Inputs())
    with pytest.raises(ReproduceError, match=r"no run with a checkpoint .* scripts/reproduce_runs.sh"):
        losses.figure5(Inputs(tmp_path))
    left_run(tmp_path / "b", SEP)
    with pytest.raises(ReproduceError, match=r"attention\.window null"):
        losses.figure5(Inputs(tmp_path))
    left_run(tmp_path / "a", FULL)
    left_run(tmp_path / "c", SEP | {"window": 128}, first=STEPS - 20)
    with pytest.raises(ReproduceError, match="was validated 1 times"):
        losses.figure5(Inputs(tmp_path))


def test_policies_at_equal_share(tmp_path: Path) -> None:
    """The rows of a table are those of the file, SepLLM first; a file of something else is named."""
    row = {"number": "1", "share": 0.25, "loss": 3.0, "perplexity": 20.0, "above_full": 0.3, "error": 0.01}
    policies = {"full": row, "SepLLM, n=64": row, "H2O": row | {"above_full": 0.1}, "SnapKV": row}
    entry = {"checkpoint": "runs/x", "separator_density": 0.1} | policies
    (tmp_path / "policies.json").write_text(json.dumps([entry]))
    result = compared("H2O")(Inputs(tmp_path))
    assert values(result, 0) == {"SepLLM, n=64": 25, "H2O": 25}
    assert values(result, 1) == {"SepLLM, n=64": 0.3, "H2O": 0.1}
    (tmp_path / "policies.json").write_text('[{"loss": 1}]')
    with pytest.raises(ReproduceError, match=r"policies.json: is no file of tools/compare_policies.py"):
        compared("H2O")(Inputs(tmp_path))


def test_needles_of_runs(folder: Path) -> None:
    """A panel for each run that was measured, its cells in the order of lengths and depths; others are named."""
    with pytest.raises(ReproduceError, match=r"no needle.json of StrmLLM n=64 below"):
        heat_maps("figure8", "StrmLLM n=64")(Inputs(folder))
    cells = [{"length": n, "depth": d, "choice": d, "exact": 0.0} for n in (512, 256) for d in (0.5, 0.0, 1.0)]
    (folder / "b" / "needle.json").write_text(json.dumps({"needle": cells}))
    result = heat_maps("figure9", "Vanilla", "SepLLM n=64")(Inputs(folder))
    assert values(result, 0) == {"SepLLM n=64": pytest.approx(50)}
    axes = result.figures["figure9"].axes[0]
    assert axes.get_images()[0].get_array().tolist() == [[0, 0], [0.5, 0.5], [1, 1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512"]
    (folder / "a" / "needle.json").write_text('{"tasks": {}}')
    with pytest.raises(ReproduceError, match=r"a/needle.json: is no file of `megatron_sep eval"):
        heat_maps("figure9", "Vanilla")(Inputs(folder))


def test_tasks_of_runs(folder: Path) -> None:
    """A table for each column that was measured, in per cent beside the paper's; local names count as lm-eval's."""
    metrics = {"arc_easy_local": {"acc": 0.25, "acc_stderr": 0.01}, "other": {"acc": 1.0}}
    (folder / "b" / "tasks.json").write_text(json.dumps({"tasks": {"x": {"metrics": metrics}}}))
    metrics = {"lambada_openai": {"perplexity": 500.0, "acc": 0.125}}
    (folder / "a" / "tasks.json").write_text(json.dumps({"tasks": {"y": {"metrics": metrics}}}))
    tables = {table.title: table.rows for table in losses.table2(Inputs(folder)).tables[3:]}
    assert list(tables) == [
        "ARC-e: arc_easy (%)",
        "LBD-ppl: lambada_openai (perplexity)",
        "LBD-acc: lambada_openai (%)",
    ]
    (row,) = tables["ARC-e: arc_easy (%)"]
    assert (row.name, row.ours, row.paper) == ("SepLLM n=64", pytest.approx(25), 46.46)
    assert "standard error 1.00" in row.why
    assert [rows[0].ours for rows in tables.values()] == pytest.approx([25, 500, 12.5])
    (folder / "a" / "tasks.json").write_text('{"tasks": {"y": 1}}')
    with pytest.raises(ReproduceError, match=r"a/tasks.json: is no file of `megatron_sep eval"):
        losses.table2(Inputs(folder))


@pytest.mark.parametrize("name", ["needle", "tasks", "policies"])
def test_a_result_of_other_weights_is_refused(folder: Path, name: str) -> None:
    """What lies in a run's dir is of its newest weights, or names none, as older versions left it."""
    row = {"number": "1", "share": 0.25, "loss": 3.0, "perplexity": 20.0, "above_full": 0.3, "error": 0.01}
    cell, metrics = {"length": 512, "depth": 0.0, "choice": 1.0}, {"arc_easy": {"acc": 0.25}}
    kept = {"needle": [cell], "tasks": {"x": {"metrics": metrics}}}
    make = {"needle": heat_maps("figure9", "SepLLM n=64"), "tasks": losses.table2, "policies": compared("H2O")}[name]

    def left(**weights: str) -> Result:
        entry = {"checkpoint": str(folder / "b"), "full": row, "H2O": row} | weights
        value = [entry] if name == "policies" else {name: kept[name], "question": {"every": 1000} | weights}
        (folder / "b" / f"{name}.json").write_text(json.dumps(value))
        return make(Inputs(folder))

    now = weights_sum(folder / "b" / "checkpoints" / "step-00000400")
    assert left(weights=now).tables == left().tables
    with pytest.raises(ReproduceError, match=rf"b/{name}.json: was measured with other weights, 0000.* remove it, and"):
        left(weights="0" * 64)


def test_seeds_are_beside_the_first(folder: Path) -> None:
    """What differs in its seed alone has a row of its own; in Figure 5's tables, not among what is compared."""
    assert len(losses.figure5(Inputs(folder)).tables) == 3
    left_run(
        folder / "s", SEP, gap=0.13, train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 8, "seed": 2}
    )
    result = losses.figure5(Inputs(folder))
    assert values(result, 3) == {"SepLLM n=64, seed 2": pytest.approx(0.03)}
    assert "s left out: another train.seed than a." in result.notes
    (folder / "s" / "tasks.json").write_text('{"tasks": {"x": {"metrics": {"piqa_local": {"acc": 0.5}}}}}')
    assert values(losses.table2(Inputs(folder)), 3) == {"SepLLM n=64, seed 2": 50}


def test_every_item_of_the_paper_is_listed() -> None:
    """Tables 1 to 17 and figures 1 to 14, no gap, each with a kind and with what it needs."""
    names = [f"table{i}" for i in range(1, 18)] + [f"figure{i}" for i in range(1, 15)]
    assert [item.name for item in ITEMS] == names
    assert [line.split()[0] for line in listing().splitlines()] == names
    assert all(item.needs and item.title.lower().replace(" ", "").startswith(f"{item.name}:") for item in ITEMS)
    assert all(item.make for item in ITEMS if item.kind == "exact")


def test_unknown_items_are_refused() -> None:
    """All wrong names at once; one that nothing makes says what it needs; `exact` is every one of that kind."""
    with pytest.raises(ReproduceError, match="table18 x: no such item"):
        chosen(["table3", "table18", "x"])
    with pytest.raises(ReproduceError, match=r"Table 14: .* is not made by this program; it needs .*LongAlpaca"):
        chosen(["table14"])
    assert {item.kind for item, _ in chosen(["exact"])} == {"exact"}

"""`tools/layouts.py` prints the table of docs/parallelism.md, of layouts that divide the model and fit the memory."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "layouts.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("layouts", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["layouts"] = module
    spec.loader.exec_module(module)
    return module


def test_the_documents_table_is_the_tools() -> None:
    """Every line that the tool prints stands in the document."""
    said = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, check=True).stdout
    document = (ROOT / "docs" / "parallelism.md").read_text()
    assert len(said.splitlines()) == 20
    assert said in document


def test_a_layout_of_one_gpu_moves_nothing_and_computes_once_more_by_a_third(tool: ModuleType) -> None:
    """No bytes for any kind of parallelism; with recomputation 3/4 of one GPU's rate is left."""
    model = tool.MODELS["llama-3-8b"].model_copy(update={"sequence_length": 4096})
    alone = tool.estimate(model, tool.ParallelConfig(), data=1, sequences=1)
    assert set(alone.received.values()) == {0.0}
    assert alone.efficiency == pytest.approx(0.75)


def test_the_chosen_layout_is_the_fastest_that_fits(tool: ModuleType) -> None:
    """Of all that divide a 128k Llama-3-8b on 64 GPUs: within the memory, and none of those is faster."""
    model = tool.MODELS["llama-3-8b"].model_copy(update={"sequence_length": 2**17})
    chosen = tool.best(model, 64)
    every = [tool.estimate(model, parallel, data, 32) for parallel, data in tool.layouts(model, 64, 32)]
    assert len(every) > 20
    assert chosen.memory <= tool.MEMORY
    assert chosen.seconds == min(one.seconds for one in every if one.memory <= tool.MEMORY)
    assert any(one.seconds < chosen.seconds for one in every)

"""AdamW of the engine, whichever row computes it: the same run, and checkpoints that go from one to the other."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_sep.config import RunConfig
from megatron_sep.kernels.call import Call
from megatron_sep.kernels.registry import OPERATIONS
from megatron_sep.model.operations import Operations
from megatron_sep.parallel.groups import topology

pytestmark = pytest.mark.usefixtures("single_process")


def trained(config: RunConfig, row: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights after the last step."""
    from megatron_sep.model import build
    from megatron_sep.train.loop import train
    from megatron_sep.train.run import build_run

    adamw = OPERATIONS["adamw"].resolve(Call.on(topology().device, torch.float32, training=True), row)
    resolve = build.resolve

    def with_row(*arguments: object) -> Operations:
        return replace(resolve(*arguments), adamw=adamw)

    with monkeypatch.context() as patch:
        patch.setattr(build, "resolve", with_row)
        run = build_run(config, topology())
    assert run.engine._adamw is adamw
    train(run)
    return {name: weight.detach().float() for name, weight in run.engine._weights[0].named_parameters()}


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_changes_its_row_at_a_checkpoint(
    precision: str, tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps by one row and four by the other: the weights of eight by the first, within bf16's last digit.

    But for the bias of the keys, which no query's weights depend on: its gradient is rounding alone.
    """

    def config(name: str, steps: int) -> RunConfig:
        train = {"steps": steps, "precision": precision, "eval_every": 0}
        return tiny(dir=str(tmp_path / name), train=train, optimizer={"decay_steps": 8})

    expected = trained(config("whole", 8), "torch", monkeypatch)
    for first, then in (("reference", "torch"), ("torch", "reference")):
        trained(config(first, 4), first, monkeypatch)
        found = trained(config(first, 8), then, monkeypatch)
        for name, weight in ((name, w) for name, w in expected.items() if not name.endswith("linear_qkv.bias")):
            close = {"atol": 2e-3, "rtol": 2e-2} if precision == "bf16" else {"atol": 1e-5, "rtol": 1e-4}
            torch.testing.assert_close(found[name], weight, **close, msg=lambda m, n=name: f"{n}: {m}")

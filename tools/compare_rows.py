"""Train one configuration with the fused rows and with plain references, and hold the difference to rounding's own.

    python tools/compare_rows.py configs/runs/pythia-160m-sep-n64.yaml data.path=... --folder F [--json FILE]

Three runs of the same data: the rows that auto takes; the reference of every operation, attention and loss included;
and that again in micro-batches of half the size, which sums the same numbers in another order: rounding alone.
"""

import argparse
from pathlib import Path

from trials import differences, losses, rates, trained, write

from megatron_sep.config import load_config

REFERENCE = "{layernorm: reference, open_residual: reference, split_rotated: reference, bias_gelu: reference, "
REFERENCE += "cross_entropy: reference, adamw: reference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", help="section.key=value, of every run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="of the runs; must not exist")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    length = f"train.steps={options.steps}", f"optimizer.decay_steps={options.steps}"
    settings = (*options.settings, *length, "metrics.every=1", "train.eval_every=0", "checkpoint.every=1000000")
    plain = (*settings, "attention.backend=reference", f"train.operations={REFERENCE}")
    half = load_config(Path(options.config), options.settings).train.micro_batch_size // 2
    runs = {
        "fused": trained(options.config, options.folder / "fused", settings, [options.gpu]),
        "reference": trained(options.config, options.folder / "reference", plain, [options.gpu]),
        "reference, summed in another order": trained(
            options.config, options.folder / "halves", (*plain, f"train.micro_batch_size={half}"), [options.gpu]
        ),
    }
    expected = losses(runs["reference"])
    rows = {name: rates(run) | differences(expected, losses(run)) for name, run in runs.items()}
    for name, row in rows.items():
        print(f"{name:>36}: {', '.join(f'{key} {value:.4g}' for key, value in row.items())}", flush=True)
    write(options.json, {"rows": rows, "losses": {name: losses(run) for name, run in runs.items()}})


if __name__ == "__main__":
    main()

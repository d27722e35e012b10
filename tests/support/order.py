"""Which test files start first: one that takes long and starts last keeps all workers but one waiting."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
LONGEST_FIRST = (
    "test_readme.py",
    "kernels/test_sep_attention_fused.py",
    "test_launchers.py",
    "parallel/test_two_processes.py",
    "train/test_posttrain.py",
    "kernels/test_sep_attention.py",
    "convert/test_memory.py",
    "generate/test_cache_properties.py",
    "model/test_compiled.py",
    "train/test_optimizer.py",
    "parallel/test_resharding.py",
    "generate/test_attach.py",
    "train/test_looks.py",
    "kernels/test_sep_decode.py",
    "kernels/test_scores.py",
    "prepare/test_prepare.py",
    "convert/test_export.py",
    "convert/test_modeling_sep.py",
    "parallel/test_parity_two_processes.py",
    "parallel/test_lost_peers.py",
    "prepare/test_on_ray.py",
    "train/test_two_ranks.py",
    "train/test_deepspeed.py",
    "train/test_resume.py",
    "evaluate/test_harness.py",
    "train/test_loop.py",
    "generate/test_policies.py",
    "train/test_stopping.py",
    "test_cli.py",
)


def place(file: Path) -> int:
    """Of a test file in the order; all that are not named share the last place."""
    name = file.relative_to(TESTS).as_posix()
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

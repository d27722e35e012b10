"""Which test files start first: one that takes long and starts last keeps all workers but one waiting."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
LONGEST_FIRST = (
    "test_readme.py",
    "parallel/test_two_processes.py",
    "train/test_resume.py",
    "train/test_two_ranks.py",
    "train/test_stopping.py",
    "test_cli.py",
    "train/test_posttrain.py",
    "kernels/test_sep_attention_fused.py",
    "kernels/test_sep_attention.py",
    "kernels/test_scores.py",
    "parallel/test_parity_two_processes.py",
    "test_quickstart_gpu.py",
    "convert/test_memory.py",
    "train/test_loop.py",
    "parallel/test_lost_peers.py",
    "train/test_saving_soak.py",
    "docs/test_blocks.py",
    "docs/test_commands.py",
)


def place(file: Path) -> int:
    """Of a test file in the order; all that are not named share the last place."""
    name = file.relative_to(TESTS).as_posix()
    return LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)

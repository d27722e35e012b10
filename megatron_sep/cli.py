"""What `megatron_sep` starts: each import adds its verbs, in the order in which `--help` lists them."""

from megatron_sep.verbs import training, planning, data, weights, inference, reporting, pile  # noqa: F401, I001
from megatron_sep.verbs.app import app


def main() -> None:
    """Run the verb that the command line names, and exit."""
    app()

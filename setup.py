"""Takes the shipped configurations and scripts into a wheel; the metadata is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "scripts")
"""Folders of the repository; an editable installation finds them there."""


class BuildWithShipped(build_py):
    """Modules, and beside them what `megatron_sep/config/shipped.py` looks for."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in SHIPPED:
                place = Path(self.build_lib) / "megatron_sep" / "shipped" / name
                shutil.copytree(Path(__file__).with_name(name), place, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithShipped})

"""Typed run configuration; torch-free, so a login node can validate it."""

from megatron_sep.config.load import ConfigError, Sketch, load_config, sketch_config, to_yaml
from megatron_sep.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "Sketch", "load_config", "sketch_config", "to_yaml"]

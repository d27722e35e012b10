"""The engines that a run can be trained by; a new one is a class of ``train.engine.Engine`` and a row."""

ENGINES = {"megatron": "megatron_sep.train.megatron_engine:MegatronEngine"}
"""``module:class`` by the name that ``train.engine`` and a checkpoint's manifest give; imported when it is chosen."""

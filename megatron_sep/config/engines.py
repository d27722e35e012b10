"""The engines that a run can be trained by; a new one is a class of ``train.engine.Engine`` and a row."""

MUON = "megatron_sep.train.muon_engine:MuonEngine"
"""What the engine megatron is where `optimizer.kind` is muon."""
ENGINES = {
    "megatron": "megatron_sep.train.megatron_engine:MegatronEngine",
    "deepspeed": "megatron_sep.train.deepspeed_engine:DeepSpeedEngine",
}
"""``module:class`` by the name that ``parallel.engine`` and a checkpoint's manifest give; imported once chosen."""
_FSDP = (
    "Megatron-FSDP is no setting here: its checkpoints have a format of their own, which no other engine goes on from. "
    "parallel.engine=deepspeed with zero_stage=3 splits the same things"
)
NOT_ENGINES = {"fsdp": _FSDP, "megatron_fsdp": _FSDP, "megatron-fsdp": _FSDP}
"""Why a name that others give an engine is none here (docs/parallelism.md)."""

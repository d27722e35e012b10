"""Process groups, and the shim that lets megatron-core run without CUDA."""

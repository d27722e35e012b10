"""Process groups, a process's place in them and its seeds, and the shim that lets megatron-core run without CUDA."""

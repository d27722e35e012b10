"""What this project and megatron-core import of NVIDIA's apex, with its signatures, in plain torch."""

"""The GPT-NeoX model on megatron-core."""

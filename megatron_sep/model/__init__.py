"""GPT-NeoX and Llama on megatron-core: one decoder whose settings make it either."""

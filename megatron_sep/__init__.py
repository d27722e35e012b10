"""SepLLM (arXiv 2412.12094) on Megatron-style parallelism: pretraining, post-training and inference."""

__version__ = "0.1.0"

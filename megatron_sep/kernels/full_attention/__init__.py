"""Attention of each query to every earlier key: torch's own kernels where the queries are all of the keys' tokens."""

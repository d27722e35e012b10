"""attention/pattern.py under the name that it has in an export, where modeling_sep.py imports it from its side."""

from megatron_sep.attention.pattern import AttentionPattern, document_numbers

__all__ = ["AttentionPattern", "document_numbers"]

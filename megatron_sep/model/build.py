"""From configuration to TransformerConfig to GPTModel, nowhere else."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from megatron_sep.config.schema import ModelConfig, Recompute
from megatron_sep.config.size import ModelError
from megatron_sep.model.decoder import Decoder
from megatron_sep.model.decoder_layer import decoder_block
from megatron_sep.model.init import initialise
from megatron_sep.model.operations import resolve, training_call
from megatron_sep.model.positions import Positions
from megatron_sep.model.rotation import slowed
from megatron_sep.parallel.topology import Topology

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def transformer_config(
    model: ModelConfig, topology: Topology, precision: str, sequence_parallel: bool = False, **more: Any
) -> TransformerConfig:
    """megatron-core's configuration of a decoder."""
    dtype = DTYPES[precision]
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.key_value_heads,
        "kv_channels": model.head_size,
        "ffn_hidden_size": model.mlp_size,
        "layernorm_epsilon": model.norm_eps,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_func": _ACTIVATIONS[model.activation],
        "gated_linear_unit": model.gated_mlp,
        "add_bias_linear": model.biases,
        "add_qkv_bias": model.biases,
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        "tensor_model_parallel_size": topology.tensor.size,
        "pipeline_model_parallel_size": topology.pipeline.size,
        "virtual_pipeline_model_parallel_size": topology.chunks if topology.chunks > 1 else None,
        # in one batch, two stages that are each other's next and previous would mix up what goes forward and back
        "overlap_p2p_comm": topology.chunks > 1,
        "batch_p2p_comm": topology.chunks == 1,
        "context_parallel_size": topology.context.size,
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "init_method": _left_as_is,  # model.init fills the weights; megatron-core marks how they are split
        "output_layer_init_method": _left_as_is,
        "embedding_init_method": _left_as_is,
        "use_cpu_initialization": topology.device.type != "cuda",
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "attention_backend": AttnBackend.unfused,
    }
    return TransformerConfig(**(settings | more))


_ACTIVATIONS = {"gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh"), "relu": relu, "swiglu": silu}
_EMBEDDINGS = {"rotary": "rope", "alibi": "none", "bipe": "learned_absolute"}
"""What megatron-core calls them; of bipe it embeds the places in segments."""


def _left_as_is(weight: Tensor) -> Tensor:
    return weight


def build_model(
    model: ModelConfig,
    topology: Topology,
    *,
    vocab_size: int,
    precision: str,
    seed: int,
    sequence_parallel: bool = False,
    backend: str = "auto",
    other_backends: Mapping[str, str] = MappingProxyType({}),
    recompute: Recompute = False,
    loss_chunk: int | None = None,
    compiled: bool = False,
    chunk: int = 0,
) -> Decoder:
    """This rank's part of the model, initialised, on the GPU where there is one. Raises ModelError, BackendError.

    Under an interleaved schedule the part has ``topology.chunks`` chunks, each a model of its own.

    Call it with ids, positions, and in place of the attention mask the plans of ``attention.layers.plan_layers``.
    ``backend`` is that of Sep-Attention, ``other_backends`` those of other operations by name, "auto" where not named.
    ``loss_chunk``: at most so many tokens have their logits at once (not with ``sequence_parallel``).
    """
    if vocab_size % topology.tensor.size:
        raise ModelError(f"a vocabulary of {vocab_size} does not divide by parallel.tensor={topology.tensor.size}")
    call = training_call(model, topology.device, DTYPES[precision], topology.tensor.size)
    operations = resolve(call, model.norm, dict(sep_attention=backend, **other_backends))
    built = Decoder(
        config=transformer_config(model, topology, precision, sequence_parallel),
        operations=operations,
        loss_chunk=loss_chunk,
        transformer_layer_spec=decoder_block(
            num_layers=len(topology.layers(model.num_layers, chunk)),
            operations=operations,
            parallel_residual=model.parallel_residual,
            recompute=recompute,
            compiled=compiled,
            context_group=topology.context_group,
            adjusting=model.self_adjusting_softmax,
            biases=model.biases,
            mlp_biases=model.mlp_has_biases,
            growth=model.rotary_scaling.grown if model.rotary_scaling else 1.0,
        ),
        vocab_size=vocab_size,
        max_sequence_length=model.position.length if model.position.bilevel else model.sequence_length,
        pre_process=topology.has_embedding(chunk),
        post_process=topology.has_loss(chunk),
        vp_stage=chunk if topology.chunks > 1 else None,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type=_EMBEDDINGS[model.position.kind],
        rotary_percent=model.rotary_fraction,
        rotary_base=model.rotary_base,
        compiled=compiled,
    )
    built.positions = Positions(model, _rotary(built, model), topology)
    if model.position.bilevel and topology.has_embedding(chunk):
        built.embedding.position_embeddings.to(DTYPES[precision])
    initialise(built, model, seed, topology)
    return built.cuda()  # type: ignore[no-any-return]


def _rotary(built: Decoder, model: ModelConfig) -> RotaryEmbedding | None:
    """The rotation of queries and keys: megatron-core's own, one for segments, or none."""
    if not model.position.rotates:
        return None
    rotary: RotaryEmbedding = getattr(built, "rotary_pos_emb", None) or RotaryEmbedding(
        kv_channels=built.config.kv_channels,
        rotary_percent=model.rotary_fraction,
        rotary_base=model.rotary_base,
        use_cpu_initialization=built.config.use_cpu_initialization,
    )
    if model.rotary_scaling:
        rotary.inv_freq = slowed(rotary.inv_freq, model.rotary_base, model.rotary_scaling)
    return rotary

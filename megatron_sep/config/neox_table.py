"""The one table of GPT-NeoX's and SepLLM's keys: what becomes of each, and what it means where a file leaves it out.

A key is mapped to ours, ignored or refused, the latter two with the reason. Keys that only mean something together
(`Part`) are put together in `neox_parts`.
"""

from typing import Any

from megatron_sep.config.neox_rules import NEEDED, ArchitectureError, Ignored, Only, Part, Refused, Rule, To, choose


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    """The same for several keys."""
    return dict.fromkeys(names.split(), rule)


def _split(value: Any) -> list[float]:
    shares = [float(part) for part in str(value).split(",")]
    return [share / sum(shares) for share in [*shares, 0.0, 0.0][:3]]


_INIT = {name: name for name in ("small_init", "wang_init", "normal", "scaled_normal")}
_NORMS = {"layernorm": "layernorm", "rmsnorm": "rmsnorm", "te_layernorm": "layernorm", "te_rmsnorm": "rmsnorm"}
_ADAM = {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}}
_LOSS_SCALE = {
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
_LOADER = "the data are read by this project's own loader"
_FUSION = "which kernels are fused is chosen from the hardware"
_ZERO = "the optimizer state is always split among the data-parallel ranks (ZeRO-1)"
_LAUNCH = "processes are started by torchrun, SLURM or deepspeed, and found in their environment"
_LOGS = "status lines are a matter of `metrics`"
_SUMS = "gradients are always summed in fp32"
_SCALE = "the loss scale is that of fp16"
_EXPERTS = "a mixture of experts is another architecture"
_LABELS = "labels, rewards and pairs beside the text are not read; data.instructions learns prompts and responses"
_TEXT = "`generate` takes it as an option, and needs none of it to train"
_WITHOUT = "no number depends on it here"
_RATIO = "the visible share is always logged, as attention/visible"
_GENERATION = "the window of generation is that of training"
_SHARE = "with train_data_paths all of the data is trained on; set data.split and train.eval_every to validate"

GPT_NEOX: dict[str, Rule] = {
    # the model
    "num_layers": To("model.num_layers", default=NEEDED),
    "hidden_size": To("model.hidden_size", default=NEEDED),
    "num_attention_heads": To("model.num_attention_heads", default=NEEDED),
    "model_arch": Only(("gpt2",), "an encoder is no part of a decoder", error=ArchitectureError),
    "moe_num_experts": Only((1,), _EXPERTS, error=ArchitectureError),
    "num_experts": Only((1,), _EXPERTS, error=ArchitectureError),
    "num_unique_layers": Refused("layers do not share weights"),
    "soft_prompt_tuning": Refused("a whole model is trained; leave it out"),
    "num_kv_heads": To("model.num_key_value_heads"),
    "intermediate_size": Part("mlp"),
    "expansion_factor": Part("mlp"),
    "mlp_multiple_of": Part("mlp", default=1),
    "mlp_type": Part("mlp", default="regular"),
    "seq_length": To("model.sequence_length", default=NEEDED),
    "sliding_window_width": Part("attention"),
    "attention_type": Ignored("num_kv_heads says it"),
    "max_position_embeddings": Part("position"),
    "norm": To("model.norm", choose("norm", _NORMS), default="layernorm"),
    "layernorm_epsilon": Part("norm_eps", default=1e-5),
    "rms_norm_epsilon": Part("norm_eps", default=1e-8),
    "activation": Part("mlp", default="gelu"),
    "use_bias_in_norms": Part("norm"),
    "use_qk_layernorm": Only((False,), "queries and keys have no norm of their own"),
    "use_bias_in_attn_linear": Part("biases", default=True),
    "use_bias_in_mlp": Part("biases"),
    "pos_emb": Only(
        ("rotary", "alibi"),
        "positions are rotary or ALiBi, and weights trained with others cannot be converted",
        default="learned",
        of="position",
    ),
    "rotary_pct": To("model.rotary_fraction", default=1.0),
    "rotary_emb_base": To("model.rotary_base", default=10_000),
    "no_weight_tying": To("model.tie_embeddings", lambda value: not value, default=False),
    "gpt_j_residual": To("model.parallel_residual", default=False),
    "gpt_j_tied": Only((False,), "both residual branches have a norm of their own", default=False),
    "output_layer_parallelism": Only(("column",), "the output layer is split along the vocabulary"),
    "attention_config": Part("attention"),
    "sparsity_config": Ignored("attention_config says which layers are sparse"),
    "sparse_attention": Refused("layers here are of attention to every earlier token"),
    "opt_pos_emb_offset": Only((0,), "rotary positions have no offset"),
    "make_vocab_size_divisible_by": Part("vocab_multiple", default=128),
    "hidden_dropout": To("model.hidden_dropout", default=0.0),
    "attention_dropout": To("model.attention_dropout", default=0.0),
    "init_method": To("model.init", choose("init_method", _INIT), default="normal"),
    "output_layer_init_method": To(
        "model.output_init", choose("output_layer_init_method", _INIT), default="scaled_normal"
    ),
    "init_method_std": To("model.init_std", default=0.02),
    "apply_query_key_layer_scaling": Only((False,), "scores are scaled by 1 / sqrt(head size) alone", default=False),
    "attention_softmax_in_fp32": Ignored("the softmax is always computed in fp32"),
    "precision": Part("precision"),
    "fp16": Part("precision", inside=_LOSS_SCALE),
    "bf16": Part("precision"),
    "fp32_allreduce": Ignored(_SUMS),
    "data_types": Ignored(_SUMS),
    "communication_data_type": Ignored(_SUMS),
    "prescale_gradients": Ignored(_SUMS),
    "gradient_predivide_factor": Ignored(_SUMS),
    "sparse_gradients": Ignored(_SUMS),
    "fp16_lm_cross_entropy": Ignored("the loss is always computed in fp32"),
    "dynamic_loss_scale": Ignored(_SCALE),
    "loss_scale": Ignored(_SCALE),
    "loss_scale_window": Ignored(_SCALE),
    "hysteresis": Ignored(_SCALE),
    "min_scale": Ignored(_SCALE),
    "amp": Refused("give fp16 or bf16"),
    "use_mup": Only((False,), "muP is not part of this program"),
    "base_shapes_file": Ignored("use_mup is off"),
    "coord_check": Ignored("use_mup is off"),
    # kernels
    "scaled_upper_triang_masked_softmax_fusion": Ignored(_FUSION),
    "scaled_masked_softmax_fusion": Ignored(_FUSION),
    "bias_gelu_fusion": Ignored(_FUSION),
    "bias_dropout_fusion": Ignored(_FUSION),
    "layernorm_fusion": Ignored(_FUSION),
    "rmsnorm_fusion": Ignored(_FUSION),
    "rope_fusion": Ignored(_FUSION),
    "use_flashattn_swiglu": Ignored(_FUSION),
    "use_sep_attn_kernel_accelerator": Ignored("attention.backend picks the kernel; auto is the fastest there is"),
    "recompile_sep_attn_kernel": Ignored("layers are compiled once for each pattern"),
    # parallelism
    "pipe_parallel_size": To("parallel.pipeline", lambda value: max(1, value), default=0),
    "model_parallel_size": To("parallel.tensor", default=1),
    "sequence_parallel": To("parallel.sequence_parallel", default=False),
    "is_pipe_parallel": Ignored("parallel.pipeline says it"),
    "pipe_partition_method": Ignored("each pipeline stage has as many layers as the others"),
    "distributed_backend": Ignored("nccl on GPU, gloo on CPU"),
    "zero_optimization": Part("zero"),
    "zero_allow_untested_optimizer": Ignored(_ZERO),
    "world_size": Part("batch"),
    "global_num_gpus": Part("batch"),
    "num_gpus": Part("batch"),
    "launcher": Ignored(_LAUNCH),
    "hostfile": Ignored(_LAUNCH),
    "deepspeed": Ignored(_LAUNCH),
    "deepspeed_mpi": Ignored(_LAUNCH),
    "deepspeed_slurm": Ignored(_LAUNCH),
    "deepspeed_extra_args": Ignored(_LAUNCH),
    "slurm_comment": Ignored(_LAUNCH),
    "comment": Ignored(_LAUNCH),
    "user_script": Ignored(_LAUNCH),
    "no_ssh_check": Ignored(_LAUNCH),
    "force_multi": Ignored(_LAUNCH),
    "detect_nvlink_pairs": Ignored(_LAUNCH),
    "local_rank": Ignored(_LAUNCH),
    "rank": Ignored(_LAUNCH),
    "exclude": Ignored(_LAUNCH),
    "master_addr": Ignored(_LAUNCH),
    "elasticity": Refused("the number of processes stays while a run runs; it goes on with another number"),
    "master_port": Ignored(_LAUNCH),
    "include": Ignored(_LAUNCH),
    "num_nodes": Ignored(_LAUNCH),
    # optimizer and schedule
    "optimizer": Part("optimizer", default={}, inside=_ADAM),
    "optimizer_type": Only(("adam", "Adam", "adamw", "AdamW"), "AdamW is the only optimizer"),
    "use_bnb_optimizer": Only((False,), "AdamW keeps its state in fp32"),
    "compression_training": Refused("weights are trained whole"),
    "scheduler": Ignored("the schedule is lr_decay_style, warmup and lr_decay_iters"),
    "min_lr": To("optimizer.min_lr", default=0.0),
    "lr": Part("optimizer"),
    "weight_decay": To("optimizer.weight_decay", default=0.1),
    "gradient_clipping": To("optimizer.clip_grad", default=1.0),
    "clip_grad": To("optimizer.clip_grad"),
    "lr_decay_style": To(
        "optimizer.decay",
        choose("lr_decay_style", {"cosine": "cosine", "linear": "linear_to_zero", "constant": "constant"}),
        default="linear",
    ),
    "lr_decay_iters": To("optimizer.decay_steps"),
    "lr_decay_fraction": Refused("give lr_decay_iters, the steps themselves"),
    "warmup_iters": Refused("GPT-NeoX warms up for a share of the steps: give warmup, warmup_iters / lr_decay_iters"),
    "decay_lr_to": Refused("GPT-NeoX reads no such key: give min_lr, the rate itself"),
    "warmup": To("optimizer.warmup", default=0.01),
    "override_lr_scheduler": Ignored("the schedule is always that of the file"),
    "use_checkpoint_lr_scheduler": Ignored("the schedule is always that of the file"),
    # batches
    "train_batch_size": Part("batch"),
    "train_micro_batch_size_per_gpu": Part("batch", default=NEEDED),
    "gradient_accumulation_steps": Part("batch"),
    "gas": Part("batch"),
    "batch_size": Part("batch"),
    "train_iters": To("train.steps", default=NEEDED),
    "train_epochs": Refused("give train_iters, the steps themselves"),
    "exit_interval": Ignored("a run ends at train_iters, and goes on where it was stopped"),
    "curriculum_learning": Refused("sequences have one length from the first step"),
    "curriculum_seqlen": Ignored("sequences have one length from the first step"),
    "data_efficiency": Refused("sequences have one length from the first step"),
    "train_impl": Only(("normal",), "the loss is that of the next token"),
    "z_loss": Only((0, 0.0), "the loss is that of the next token"),
    "seed": Part("seed", default=1234),
    "eval_interval": Part("data", default=1000),
    "eval_iters": To("train.eval_batches", default=100),
    "do_train": Only((True,), "`train` trains"),
    "do_valid": Ignored("train.eval_every says it"),
    "do_test": Ignored("the test split is neither trained nor validated on"),
    # recomputation
    "checkpoint_activations": To("train.recompute", default=False),
    "checkpoint_num_layers": Ignored("each layer is recomputed on its own"),
    "partition_activations": Ignored("parallel.sequence_parallel splits activations"),
    "synchronize_each_layer": Ignored("no synchronisation is needed"),
    "contiguous_checkpointing": Ignored("torch's allocator keeps memory whole"),
    "checkpoint_in_cpu": Only((False,), "activations stay on the device"),
    # checkpoints
    "save": To("dir"),
    "load": Part("load"),
    "finetune": Part("load"),
    "checkpoint_factor": To("checkpoint.every"),
    "save_interval": To("checkpoint.every"),
    "checkpoint_scale": Only(("linear",), "checkpoints are made at even distances"),
    "extra_save_iters": Ignored("checkpoints are made every checkpoint.every steps"),
    "keep_last_n_checkpoints": To("checkpoint.keep"),
    "checkpoint_validation_with_forward_pass": Ignored("a checkpoint is verified by the SHA-256 of its files"),
    "load_universal": Ignored("checkpoints load on any number of ranks"),
    "s3_path": Ignored("checkpoints go to the run's dir"),
    "s3_chunk_size": Ignored("checkpoints go to the run's dir"),
    "config_files": Ignored("a run keeps its own configuration in its dir"),
    "save_base_shapes": Ignored("use_mup is off"),
    "no_save_optim": Only((False,), "a checkpoint always holds the optimizer"),
    "no_save_rng": Ignored("nothing random is saved; all of it follows from the seed"),
    "no_load_optim": Only((False,), "give checkpoint.init_from to start from weights with a new optimizer"),
    "no_load_rng": Ignored("nothing random is saved; all of it follows from the seed"),
    "iteration": Ignored("a run knows where it stands"),
    # data
    "data_path": To("data.path"),
    "train_data_paths": Part("data"),
    "valid_data_paths": Ignored(_SHARE),
    "test_data_paths": Ignored(_SHARE),
    "train_data_weights": Part("data"),
    "valid_data_weights": Ignored(_SHARE),
    "test_data_weights": Ignored(_SHARE),
    "split": To("data.split", _split, default="969, 30, 1"),
    "weight_by_num_documents": Only((False,), "weights are those of data.blend"),
    "weighted_sampler_alpha": Ignored("weights are those of data.blend"),
    "dataset_impl": Only(("gpt2",), "a sample is a row of text"),
    "pack_impl": Only(("packed",), "documents are joined; data.instructions packs whole examples"),
    "allow_chopped": Ignored("documents are joined"),
    "data_impl": Only(("mmap", "infer"), "shards are memory-mapped"),
    "mmap_warmup": Ignored(_LOADER),
    "num_workers": Ignored(_LOADER),
    "eod_mask_loss": Only((False,), "the loss counts the end-of-document token", default=False),
    "reset_position_ids": Only((False,), "set attention.document_boundaries: true; rotary positions are relative"),
    "reset_attention_mask": To("attention.document_boundaries", default=False),
    "tokenizer_type": Part("tokenizer", default="GPT2BPETokenizer"),
    "vocab_file": Part("tokenizer"),
    "merge_file": Part("tokenizer"),
    # logs
    "log_interval": To("metrics.every", default=100),
    "steps_per_print": Ignored(_LOGS),
    "wall_clock_breakdown": Ignored(_LOGS),
    "log_dir": Ignored("logs go to the run's dir"),
    "log_grad_norm": Ignored("the gradient norm is always logged"),
    "log_param_norm": Ignored(_LOGS),
    "log_gradient_noise_scale": Ignored(_LOGS),
    "log_optimizer_states": Ignored(_LOGS),
    "tensorboard_dir": To("metrics.tensorboard", bool),
    "tensorboard_writer": Ignored(_LOGS),
    "use_wandb": To("metrics.wandb", lambda value: "online" if value else "off"),
    "wandb_project": To("metrics.wandb_project", default="neox"),
    "wandb_group": Ignored("a run has the name of its dir"),
    "wandb_team": Ignored("wandb takes the team from its own settings"),
    "wandb_host": Ignored("wandb takes the host from its own settings"),
    "wandb_init_all_ranks": Ignored("the first rank logs for all"),
    "dump_state": Ignored(_LOGS),
    "use_comet": Ignored(_LOGS),
    "profile": Ignored(_LOGS),
    "char_level_ppl": Ignored(_LOGS),
    "tensorboard": Ignored(_LOGS),
    "wandb": Ignored(_LOGS),
    "csv_monitor": Ignored(_LOGS),
    "comms_logger": Ignored(_LOGS),
    "git_hash": Ignored(_LOGS),
    "log_grad_pct_zeros": Ignored(_LOGS),
    "flops_profiler": Ignored("floating-point operations are counted from the shapes, as speed/model_flops"),
    # of no matter here
    **_each(
        "temperature top_p top_k maximum_tokens prompt_end num_samples recompute return_logits "
        "precompute_model_name text_gen_type sample_input_file sample_output_file",
        Ignored(_TEXT),
    ),
    **_each("eval_tasks eval_results_prefix", Ignored("tasks are measured on an export, by another program")),
    **_each("gmlp_attn_dim dim_att head_size ffn_dim", Ignored("the model has no such layers")),
    **_each(
        "expert_interval use_tutel create_moe_param_group enable_expert_tensor_parallelism moe_top_k "
        "moe_loss_coeff moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity "
        "moe_token_dropping moe_use_residual moe_expert_parallel_size moe_type moe_glu moe_lbl_in_fp32 "
        "moe_jitter_eps",
        Ignored("the model has no experts"),
    ),
    **_each(
        "zero_stage zero_reduce_scatter zero_contiguous_gradients zero_reduce_bucket_size zero_allgather_bucket_size",
        Ignored(_ZERO),
    ),
    **_each(
        "dpo_fp32 dpo_beta dpo_reference_free kto_fp32 kto_beta kto_desirable_weight kto_undesirable_weight",
        Ignored("train_impl is normal"),
    ),
    **_each(
        "autotuning autotuning_run adlr_autoresume adlr_autoresume_interval param_sharing_style "
        "scalenorm_epsilon rotary_save_freqs_buffer use_cpu_initialization lazy_mpu_init short_seq_prob "
        "onnx_safe deepscale deepscale_config use_shared_fs deepspeed_activation_checkpointing "
        "activation_checkpointing",
        Ignored(_WITHOUT),
    ),
    **_each(
        "train_label_data_paths train_reward_data_paths pos_train_label_data_paths neg_train_label_data_paths "
        "valid_label_data_paths valid_reward_data_paths pos_valid_label_data_paths neg_valid_label_data_paths "
        "test_label_data_paths test_reward_data_paths pos_test_label_data_paths neg_test_label_data_paths "
        "pos_train_data_paths neg_train_data_paths pos_valid_data_paths neg_valid_data_paths "
        "pos_test_data_paths neg_test_data_paths",
        Refused(_LABELS),
    ),
}
"""What GPT-NeoX's own keys become; the defaults are those of its arguments."""

PREFIXES: dict[str, Rule] = {
    "te_": Ignored("layers are computed in train.precision by the kernels that the hardware has"),
    "comet_": Ignored(_LOGS),
    "profile_": Ignored(_LOGS),
    "memory_profiling": Ignored(_LOGS),
    "gradient_noise_scale_": Ignored(_LOGS),
    "mup_": Ignored("use_mup is off"),
    "mamba_": Ignored("the model has no such layers"),
    "rpe_": Ignored("pos_emb says the positions"),
}
"""What becomes of GPT-NeoX's keys that begin like this and are not in its table."""

SEPLLM: dict[str, Rule] = {
    "separator_token_ids": Part("attention"),
    "init_tok_max_idx": Part("attention", default=2),
    "prefill_local_window_size": Part("attention", default=256),
    "use_prefill_local_win_sizes_wrt_layers": Part("attention", default=False),
    "prefill_loc_win_size_list": Part("attention"),
    "use_original_full_atten": Part("attention", default=False),
    "streamingllm": Part("attention", default=False),
    "use_fixed_sep_intervals": Part("attention", default=False),
    "fixed_sep_intervals_list": Part("attention"),
    "generate_local_window_size": Ignored(_GENERATION),
    "use_generate_local_win_sizes_wrt_layers": Ignored(_GENERATION),
    "generate_win_loc_size_list": Ignored(_GENERATION),
    "prefill_k": Only((0,), "was never implemented"),
    "generate_k": Only((0,), "was never implemented"),
    "layer_num": To("model.num_layers"),
    "padding_id": Ignored("training data have no padding"),
    "batch_adaptive_init_pos": Ignored("training data have no padding"),
    "exclude_diagonal": Only((True,), "the window counts the query itself"),
    "print_kv_ratio": Ignored(_RATIO),
    "print_ratio_intervals": Ignored(_RATIO),
    "floating_window": Only((True,), "a window goes with its query"),
    "use_flex": Ignored("attention.backend picks the kernel"),
    "use_seg_atten": Ignored("attention.backend picks the kernel"),
    "random_special_tokens_uniform": Only((False,), "was never implemented"),
    "random_special_tokens_general": Only((False,), "was never implemented"),
    "use_bipe": Part("position"),
    "bipe_seps": Part("position"),
    "use_sa_softmax": Part("softmax"),
    "use_sa_softmax_no_deno": Part("softmax"),
    "sa_numerator_bias": Part("softmax"),
    "sa_denominator_bias": Part("softmax"),
}
"""What the keys of SepLLM's official code become; the defaults are those of its arguments."""

OLDER = {
    "special_tokens_id": "separator_token_ids",
    "att_sink_max_idx": "init_tok_max_idx",
    "prefill_window_size": "prefill_local_window_size",
    "decode_window_size": "generate_local_window_size",
    "use_dynamic_prefill_window_size": "use_prefill_local_win_sizes_wrt_layers",
    "use_dynamic_decode_window_size": "use_generate_local_win_sizes_wrt_layers",
    "prefill_win_size_list": "prefill_loc_win_size_list",
    "decode_win_size_list": "generate_win_loc_size_list",
    "decode_k": "generate_k",
    "original_flag": "use_original_full_atten",
    "batch_dynamic_att_sink": "batch_adaptive_init_pos",
    "print_kv_intervals": "print_ratio_intervals",
    "use_seg_attn_accelerator": "use_sep_attn_kernel_accelerator",
}
"""Names that SepLLM's keys had while it was called SegLLM; their defaults were the same."""

TABLE: dict[str, Rule] = GPT_NEOX | SEPLLM


def rule_of(key: str) -> Rule | None:
    """What becomes of a key in the table's spelling; None where it is not known."""
    return TABLE.get(key) or next((rule for start, rule in PREFIXES.items() if key.startswith(start)), None)

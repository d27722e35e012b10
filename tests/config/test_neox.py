"""Files of GPT-NeoX, Pythia and SepLLM load as they are; each of their keys is mapped, ignored or refused by name."""

from pathlib import Path

import pytest
import yaml

from megatron_sep.config import ConfigError, RunConfig, load_config, to_yaml
from megatron_sep.config.load import neox_notes
from megatron_sep.config.neox import TABLE, To, spell
from megatron_sep.config.position import PositionConfig, SelfAdjustingConfig
from megatron_sep.config.section import Section

PYTHIA = """
{
  # a comment
  "pipe-parallel-size": 0, "model-parallel-size": 2,
  "num-layers": 4,
  "hidden-size": 64,
  "num-attention-heads": 4,
  "seq-length": 128, "max-position-embeddings": 128,
  "pos-emb": "rotary",
  "rotary-pct": 0.25,
  "no-weight-tying": true,
  "gpt-j-residual": true,
  "output-layer-parallelism": "column",
  "attention-config": [[["flash"], 4]]

  "scaled-upper-triang-masked-softmax-fusion": true,
  "init_method": "small_init", "output_layer_init_method": "wang_init",
  "optimizer": {"type": "Adam", "params": {"lr": 0.0002, "betas": [0.9, 0.95], "eps": 1.0e-8,}},
  "min_lr": 0.00002,
  "zero_optimization": {"stage": 1, "allgather_partitions": True, "cpu_offload": False},
  "train_micro_batch_size_per_gpu": 8,  # of 4 GPUs
  "gas": 2,
  "data-impl": "mmap",
  "checkpoint-activations": true,
  "gradient_clipping": 1.0, "weight-decay": 0.1, "hidden-dropout": 0, "attention-dropout": 0,
  "fp16": {"fp16": true, "enabled": true, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12,
           "hysteresis": 2, "min_loss_scale": 1,},
  "train-iters": 500, "lr-decay-iters": 480, "lr-decay-style": "cosine", "warmup": 0.01,
  "checkpoint-factor": 100, "extra-save-iters": [0, 1, 2], "eval-interval": 40000, "eval-iters": 10,
  "log-interval": 10, "steps_per_print": 10,
  "train-data-paths": ["data/pile"], "valid-data-paths": ["data/pile"], "test-data-paths": ["data/pile"],
  "tokenizer-type": "HFTokenizer", "vocab-file": "data/20B_tokenizer.json",
  "launcher": "slurm", "deepspeed_slurm": true,
}
"""
SEPLLM = """
{
  'separator_token_ids': [15, 13, 32, 2, 28, 27, 209, 186, 187],
  'PADDING_ID': 0 ,
  'USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS': True,
  'prefill_loc_win_size_list': [128, 16, 16, 128],
  'generate_win_loc_size_list': [128, 16, 16, 128],
  'init_tok_max_idx': 2,
  'USE_ORIGINAL_FULL_ATTEN': False, 'streamingLLM': False, 'USE_SEP_ATTN_KERNEL_ACCELERATOR': True,
  'BATCH_ADAPTIVE_INIT_POS': False, 'PRINT_KV_RATIO': True, 'print_ratio_intervals': 8000,
  'USE_BiPE': False, 'BiPE_seps': [15],
}
"""


SEGLLM = """
'special_tokens_id': [15, 13, 32, 2, 28, 27, 209, 186, 187]
'att_sink_max_idx': 2
'USE_DYNAMIC_PREFILL_WINDOW_SIZE': True
'prefill_win_size_list': [128, 16, 16, 128]
'USE_DYNAMIC_DECODE_WINDOW_SIZE': True
'decode_win_size_list': [128, 16, 16, 128]
'original_flag': False
'BATCH_DYNAMIC_ATT_SINK': False
'print_KV_intervals': 8000
'USE_FLEX': True
'USE_SEG_ATTN_ACCELERATOR': True
"""


PUBLIC = """
pipe-parallel-size model-parallel-size num-layers hidden-size num-attention-heads seq-length max-position-embeddings
norm pos-emb rotary-pct no-weight-tying gpt-j-residual output-layer-parallelism attention-config
scaled-upper-triang-masked-softmax-fusion scaled_masked_softmax_fusion bias-gelu-fusion init_method
output_layer_init_method optimizer min_lr zero_optimization train_micro_batch_size_per_gpu gradient_accumulation_steps
gas data-impl num_workers checkpoint-activations checkpoint-num-layers partition-activations synchronize-each-layer
gradient_clipping weight-decay hidden-dropout attention-dropout fp16 train-iters lr-decay-iters distributed-backend
lr-decay-style warmup checkpoint-factor save-interval extra-save-iters eval-interval eval-iters log-interval
steps_per_print wall_clock_breakdown train-data-paths valid-data-paths test-data-paths tokenizer-type vocab-file
launcher deepspeed_mpi deepspeed_slurm save load use_wandb wandb_group wandb_team wandb_project hostfile world_size
num_gpus separator_token_ids PADDING_ID prefill_local_window_size generate_local_window_size
USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS USE_GENERATE_LOCAL_WIN_SIZES_wrt_LAYERS prefill_loc_win_size_list
generate_win_loc_size_list init_tok_max_idx USE_BiPE BiPE_seps USE_ORIGINAL_FULL_ATTEN streamingLLM
USE_SEP_ATTN_KERNEL_ACCELERATOR RECOMPILE_SEP_ATTN_KERNEL BATCH_ADAPTIVE_INIT_POS PRINT_KV_RATIO print_ratio_intervals
Layer_num prefill_k generate_k EXCLUDE_DIAGONAL USE_FIXED_SEP_INTERVALs fixed_sep_intervals_list USE_SA_SOFTMAX
USE_SA_SOFTMAX_NO_DENO SA_Numerator_Bias SA_Denominator_Bias
"""
"""Keys of the public Pythia files and of the official SepLLM's."""


def test_every_public_key_is_in_the_table() -> None:
    """No key of a public file is unknown."""
    assert {key for key in PUBLIC.split() if spell(key) not in TABLE} == set()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "pythia.yml").write_text(PYTHIA)
    (tmp_path / "sep.yml").write_text(SEPLLM)
    return tmp_path


def test_a_pythia_file_loads_unchanged(files: Path) -> None:
    """Trailing commas, a comma that is missing, comments and dashes; every value arrives where it belongs."""
    config = load_config(files / "pythia.yml")
    model, train = config.model, config.train
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.sequence_length) == (4, 64, 4, 128)
    assert (model.tie_embeddings, model.parallel_residual, model.vocab_multiple) == (False, True, 256)
    assert (config.parallel.tensor, config.parallel.pipeline) == (2, 1)
    assert (config.optimizer.lr, config.optimizer.min_lr, config.optimizer.decay_steps) == (2e-4, 2e-5, 480)
    assert (train.precision, train.loss_scale.initial, train.recompute, train.steps) == ("fp16", 4096.0, True, 500)
    assert (train.micro_batch_size, train.global_batch_size, train.eval_every) == (8, 16, 0)
    assert (str(config.data.path), config.data.order, config.data.split) == ("data/pile", "neox", (1.0, 0.0, 0.0))
    assert config.data.epoch_margin == 1.005
    assert str(config.tokenizer.path) == "data/20B_tokenizer.json"
    assert str(config.dir) == "runs/pythia"
    assert config.attention.window is None
    assert config.checkpoint.every == 100


def test_several_files_are_merged_and_ours_lie_on_top(files: Path) -> None:
    """A Pythia file, a SepLLM file, a file of this project and an override; H/T with the paper's separators."""
    (files / "more.yaml").write_text("dir: elsewhere\ntrain: {steps: 7}\n")
    words = [str(files / "sep.yml"), str(files / "more.yaml"), "metrics.every=3"]
    config = load_config(files / "pythia.yml", words)
    attention = config.attention
    assert (attention.window, attention.sinks, attention.full_layers) == (16, 3, (0, 3))
    assert (attention.separators, attention.separator_ids) == ("default", ())
    assert (str(config.dir), config.train.steps, config.metrics.every) == ("elsewhere", 7, 3)


def test_a_file_of_an_older_version_is_the_same_pattern(files: Path) -> None:
    """SepLLM's keys had other names while it was called SegLLM."""
    (files / "older.yml").write_text(SEGLLM)
    older, newer = (load_config(files / "pythia.yml", [str(files / name)]) for name in ("older.yml", "sep.yml"))
    assert older.attention == newer.attention
    assert "special_tokens_id: goes into attention" in neox_notes(files / "older.yml")


def test_a_key_of_another_program_is_likened_to_none(tmp_path: Path) -> None:
    """A branch of GPT-NeoX with AxoNN has this one, which is no misspelling of any other."""
    (tmp_path / "axonn.yml").write_text("{'num-layers': 4, 'use_axonn_model_parallelism': true}")
    with pytest.raises(ConfigError, match=r"use_axonn_model_parallelism: no key of GPT-NeoX or SepLLM\n"):
        load_config(tmp_path / "axonn.yml")


def test_clipping_that_is_said_twice_is_taken_where_both_agree(files: Path) -> None:
    """The optimizer's max_grad_norm, as in the guide of GPT-NeoX, beside gradient_clipping."""
    text = PYTHIA.replace('"lr": 0.0002', '"lr": 0.0002, "max_grad_norm": 1.0')
    assert text != PYTHIA
    (files / "twice.yml").write_text(text)
    once, twice = (load_config(files / name, ["dir=here"]) for name in ("pythia.yml", "twice.yml"))
    assert twice == once


def test_the_number_of_processes_makes_the_global_batch(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 sequences x 2 accumulations x 16 processes / tensor-parallel 2, as GPT-NeoX counts."""
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert load_config(files / "pythia.yml").train.global_batch_size == 128


def test_the_native_equivalent_is_the_same_run(files: Path) -> None:
    """What `show` prints loads as the same configuration, and each key of the file has its line below it."""
    config = load_config(files / "pythia.yml", [str(files / "sep.yml")])
    (files / "native.yaml").write_text(to_yaml(config))
    assert load_config(files / "native.yaml") == config
    notes = neox_notes(files / "pythia.yml", [str(files / "sep.yml")])
    assert "num-layers: becomes model.num_layers" in notes
    assert "data-impl: is as here" in notes
    assert any(note.startswith("launcher: ignored: processes are started by") for note in notes)
    assert {note.split(":")[0] for note in notes} >= yaml.safe_load(SEPLLM).keys()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"streamingLLM": True}, {"separators": (), "window": 16}),
        ({"USE_ORIGINAL_FULL_ATTEN": True}, {"window": None, "sinks": 0}),
        ({"USE_FIXED_SEP_INTERVALs": True, "fixed_sep_intervals_list": [5] * 4}, {"stride": 5, "separators": ()}),
        (
            {"USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS": False, "prefill_local_window_size": 9},
            {"window": 9, "full_layers": ()},
        ),
        ({"separator_token_ids": [13, 11, 30]}, {"separators": (), "separator_ids": (13, 11, 30)}),
    ],
    ids=["streaming", "full", "fixed", "one window", "other ids"],
)
def test_variants_become_values(changes: dict[str, object], expected: dict[str, object], files: Path) -> None:
    """Each variant of the official code is a value of the attention section."""
    (files / "sep.yml").write_text(yaml.safe_dump(yaml.safe_load(SEPLLM) | changes))
    attention = load_config(files / "pythia.yml", [str(files / "sep.yml")]).attention
    assert {name: getattr(attention, name) for name in expected} == expected


def test_zero_2_and_3_are_deepspeeds(files: Path) -> None:
    """The stages that GPT-NeoX leaves to DeepSpeed choose its engine, which is data-parallel alone."""
    text = (
        (files / "pythia.yml")
        .read_text()
        .replace('"stage": 1', '"stage": 3')
        .replace('"fp16": {"fp16"', '"bf16": {"bf16"')
    )
    (files / "split.yml").write_text(text)
    with pytest.raises(ConfigError, match="engine=deepspeed is data-parallel alone: set tensor=2 to 1"):
        load_config(files / "split.yml")
    (files / "zero.yml").write_text(text.replace('"model-parallel-size": 2', '"model-parallel-size": 1'))
    parallel = load_config(files / "zero.yml").parallel
    assert (parallel.engine, parallel.zero_stage) == ("deepspeed", 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("'num-layer': 4", "num-layer: no key of GPT-NeoX or SepLLM; did you mean num_layers"),
        (
            "'pos-emb': 'learned'",
            "bad.yml: 1 mistake(s)\n  pos_emb='learned' is refused: positions are rotary or ALiBi, and weights trained "
            "with others cannot be converted; pos_emb='rotary' or 'alibi' is taken",
        ),
        ("'USE_BiPE': True", "BiPE_seps: is needed where USE_BiPE is on"),
        ("'USE_SA_SOFTMAX': True, 'USE_SA_SOFTMAX_NO_DENO': True", "are two kinds of softmax; turn one of them on"),
        ("'optimizer': {'type': 'sm3'}", "optimizer.type='sm3': AdamW is the only optimizer"),
        (
            "'gradient_clipping': 0.5, 'optimizer': {'params': {'max_grad_norm': 1.0}}",
            "optimizer.params.max_grad_norm=1.0: gradient_clipping is 0.5; leave one of them out",
        ),
        (
            "'vocab-file': 'a/gpt2-vocab.json', 'merge-file': 'b/merges.txt', 'tokenizer_type': 'GPT2BPETokenizer'",
            "merge_file='b/merges.txt': the merges of vocab_file are looked for in a/gpt2-merges.txt or a/merges.txt",
        ),
        ("'vocab-file': 'x', 'tokenizer_type': 'TiktokenTokenizer'", "or leave vocab_file out and give tokenizer.path"),
        ("'attention-config': [[['sparse_fixed'], 4]]", "attention_config names sparse_fixed"),
        ("'train-data-paths': ['a', 'b']", "names 2 sets: write them as data.blend"),
        ("'load': 'checkpoints'", "load='checkpoints': GPT-NeoX's own checkpoints are converted first"),
        (
            "'init_tok_max_idx': 2, 'USE_PREFILL_LOCAL_WIN_SIZES_wrt_LAYERS': True, 'seq_length': 128, "
            "'prefill_loc_win_size_list': [1, 2, 3, 128]",
            "prefill_loc_win_size_list=[1, 2, 3]: layers have one and the same size",
        ),
        ("'num-layers': 4, 'num_layers': 5", "num_layers is both 4 and 5, in two spellings"),
    ],
)
def test_what_cannot_be_taken_over_is_refused_by_name(lines: str, message: str, tmp_path: Path) -> None:
    """Unknown and refused keys are errors that name the key, its value and the way out."""
    (tmp_path / "bad.yml").write_text("{'train-iters': 10, " + lines + ",}")
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "bad.yml")
    assert message in str(raised.value)


def test_a_refused_key_is_named_with_its_file(files: Path) -> None:
    """Of several files, the error names for each key the one that it stands in."""
    (files / "more.yml").write_text("{'use-MUP': true, 'num-layer': 4}")
    with pytest.raises(ConfigError) as raised:
        load_config(files / "pythia.yml", [str(files / "more.yml")])
    first, *lines = str(raised.value).splitlines()
    assert first == f"{files / 'pythia.yml'}, {files / 'more.yml'}: 2 mistake(s)"
    assert all(line.endswith(f"(in {files / 'more.yml'})") for line in lines)


NINE = [15, 13, 32, 2, 28, 27, 209, 186, 187]
POSITIONS = [
    ({"pos-emb": "alibi"}, PositionConfig(kind="alibi")),
    ({"USE_BiPE": True, "BiPE_seps": NINE}, PositionConfig(kind="bipe", length=128)),
    (
        {"pos-emb": "alibi", "USE_BiPE": True, "BiPE_seps": [7, 9], "max-position-embeddings": 512},
        PositionConfig(kind="bipe", segments="alibi", separators=(), separator_ids=(7, 9), length=512),
    ),
    ({"USE_BiPE": False, "BiPE_seps": NINE}, PositionConfig()),
]


@pytest.mark.parametrize(("keys", "position"), POSITIONS, ids=["alibi", "bipe, rotary", "bipe, alibi", "off"])
def test_positions_of_the_official_code_become_values(
    keys: dict[str, object], position: PositionConfig, files: Path
) -> None:
    """Each kind beside SepLLM's attention, which it does not change."""
    embedding, length = keys.get("pos-emb", "rotary"), keys.get("max-position-embeddings", 128)
    pythia = PYTHIA.replace('"pos-emb": "rotary"', f'"pos-emb": "{embedding}"')
    pythia = pythia.replace('"max-position-embeddings": 128', f'"max-position-embeddings": {length}')
    (files / "pythia.yml").write_text(pythia)
    own = {key: value for key, value in keys.items() if "BiPE" in key}
    (files / "sep.yml").write_text(yaml.safe_dump(yaml.safe_load(SEPLLM) | own))
    config = load_config(files / "pythia.yml", [str(files / "sep.yml")])
    assert config.model.position == position
    assert (config.attention.window, config.attention.full_layers) == (16, (0, 3))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"USE_SA_SOFTMAX": True}, SelfAdjustingConfig()),
        (
            {"USE_SA_SOFTMAX": True, "SA_Numerator_Bias": 1, "SA_Denominator_Bias": 0.5},
            SelfAdjustingConfig(numerator_bias=1.0, denominator_bias=0.5),
        ),
        ({"USE_SA_SOFTMAX_NO_DENO": True, "SA_Numerator_Bias": 1}, SelfAdjustingConfig(denominator=False)),
        ({"USE_SA_SOFTMAX": False}, None),
    ],
    ids=["denominator", "biases", "product", "off"],
)
def test_the_softmax_of_the_official_code_becomes_a_value(
    keys: dict[str, object], expected: SelfAdjustingConfig | None, files: Path
) -> None:
    """With SepLLM's attention too, which their code does not allow."""
    (files / "sep.yml").write_text(yaml.safe_dump(yaml.safe_load(SEPLLM) | keys))
    config = load_config(files / "pythia.yml", [str(files / "sep.yml")])
    assert config.model.self_adjusting_softmax == expected


def test_two_files_that_disagree_are_refused(files: Path) -> None:
    """As in GPT-NeoX, a key may stand in two files only with one value; the error names both files."""
    (files / "other.yml").write_text("{'num_layers': 5}")
    with pytest.raises(ConfigError, match=r"num_layers is 4 in .*pythia.yml and 5 in .*other.yml"):
        load_config(files / "pythia.yml", [str(files / "other.yml")])


def test_every_target_of_the_table_is_a_key_of_ours() -> None:
    """A path that the table maps to exists in the schema."""
    for key, rule in TABLE.items():
        if isinstance(rule, To):
            section: type[Section] = RunConfig
            *outer, leaf = rule.path.split(".")
            for name in outer:
                section = section.model_fields[name].annotation  # type: ignore[assignment]
            assert leaf in section.model_fields, key

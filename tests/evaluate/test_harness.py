"""Tasks of lm-eval through an attached model, against its own Hugging Face class and the dense mask."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import with_masks
from torch import Tensor

from megatron_sep.evaluate.texts import EvaluationError
from megatron_sep.generate.harness_tokenizer import transformers_tokenizer
from megatron_sep.generate.session import Session, open_session

pytest.importorskip("lm_eval", reason="needs lm-eval: the extra `eval`")
pytest.importorskip("accelerate", reason="needs accelerate: the extra `eval`")

from megatron_sep.evaluate.harness import AttachedLM, Tasks, find_tasks, run_task

ANSWERS = (["cats do.", "dogs, too: it is!", "lines"], ["it is.", "numbers; and lines end"], ["text", "5678 or 12"])
CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITING = """task: tiny_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Tasks:
    """A task of choices of unequal length, and one of writing, on local JSON lines."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": "The cat sat, as cats do; " * (number + 1) + "and", "choices": choices, "gold": 0}
        for number, choices in enumerate(ANSWERS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "writing.yaml").write_text(WRITING.format(data=data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        return find_tasks(["tiny_choice", "tiny_writing"], folder)


def rows_of(lm: Any, tasks: Tasks, name: str) -> list[Any]:
    """What the model said to each document, as lm-eval notes it."""
    import lm_eval

    found = lm_eval.simple_evaluate(lm, tasks=[name], task_manager=tasks.manager, bootstrap_iters=0)
    return [row["resps"] for row in sorted(found["samples"][name], key=lambda row: row["doc_id"])]


def numbers(rows: list[Any]) -> Tensor:
    return torch.tensor([float(value[0][0]) for row in rows for value in row], dtype=torch.float64)


@pytest.fixture
def opened(model_dir: Path) -> Callable[..., tuple[Session, AttachedLM]]:
    def make(pattern: Path, batch: int = 1) -> tuple[Session, AttachedLM]:
        session = open_session(model_dir, pattern, None, None)
        tokenizer = transformers_tokenizer(model_dir, session.loaded.tokenizer)
        return session, AttachedLM(session.loaded.model, session.attachment, tokenizer, batch, 128)

    return make


@pytest.fixture
def theirs(model_dir: Path) -> Callable[..., Any]:
    """lm-eval's own class on the same tokenizer."""

    def make(model: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        from megatron_sep.data.tokenizer import load_tokenizer

        tokenizer = transformers_tokenizer(model_dir, load_tokenizer(model_dir / "tokenizer.json"))
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=128)

    return make


def plain(model_dir: Path) -> Any:
    from transformers import GPTNeoXForCausalLM

    return GPTNeoXForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_full_attention_is_lm_evals_own_class(
    opened: Callable[..., Any], theirs: Callable[..., Any], model_dir: Path, full_file: Path, tasks: Tasks, batch: int
) -> None:
    """Log-likelihoods of the same samples within 1e-4, alone and in a batch, and the same text written."""
    _, lm = opened(full_file, batch)
    reference = theirs(plain(model_dir))
    found, expected = (numbers(rows_of(each, tasks, "tiny_choice")) for each in (lm, reference))
    assert len(found) == sum(map(len, ANSWERS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert rows_of(lm, tasks, "tiny_writing") == rows_of(reference, tasks, "tiny_writing")
    assert lm.retention.share == 1


def test_a_pattern_is_the_masked_forward_pass(
    opened: Callable[..., Any], theirs: Callable[..., Any], model_dir: Path, pattern_file: Path, tasks: Tasks
) -> None:
    """Log-likelihoods under a pattern are those of transformers under its dense mask: 1e-4, batched too."""
    session, lm = opened(pattern_file)
    found = numbers(rows_of(lm, tasks, "tiny_choice"))
    reference = theirs(plain(model_dir))
    patterns = session.attachment.policies
    reference._model_call = lambda inps: masked(model_dir, patterns, inps)
    torch.testing.assert_close(found, numbers(rows_of(reference, tasks, "tiny_choice")), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        numbers(rows_of(opened(pattern_file, 4)[1], tasks, "tiny_choice")), found, atol=1e-4, rtol=0
    )
    assert 0.2 < lm.retention.share < 0.7


@torch.no_grad()
def masked(model_dir: Path, patterns: Any, ids_BT: Tensor) -> Tensor:
    model = plain(model_dir)
    with_masks(model, tuple(pattern.plan(ids_BT) for pattern in patterns))
    logits: Tensor = model(ids_BT).logits
    return logits


def test_writing_goes_through_the_cache(
    opened: Callable[..., Any], model_dir: Path, pattern_file: Path, tasks: Tasks
) -> None:
    """What a task lets the model write is greedy decoding under the dense mask, in a batch of unequal prompts too."""
    session, lm = opened(pattern_file)
    found = run_task(lm, tasks, "tiny_writing", fewshot=0, limit=None, log_samples=True)
    tokenizer = session.loaded.tokenizer
    for row in found["rows"]["tiny_writing"]:
        ids = tokenizer.encode(row["doc"]["question"])
        for _ in range(6):
            ids.append(int(masked(model_dir, session.attachment.policies, torch.tensor([ids]))[0, -1].argmax()))
        expected = tokenizer.decode(ids)[len(row["doc"]["question"]) :]
        assert row["resps"][0][0].strip() == expected.split("zzz")[0].strip()
    assert found["retention"] < 0.7
    batched = run_task(opened(pattern_file, 3)[1], tasks, "tiny_writing", fewshot=0, limit=None, log_samples=True)
    written, other = ([row["resps"] for row in each["rows"]["tiny_writing"]] for each in (found, batched))
    assert written == other


def test_what_is_no_task_is_named(tmp_path: Path) -> None:
    """Names that lm-eval does not know, a directory that is not there, data that cannot be had."""
    with pytest.raises(EvaluationError, match=r"--tasks no_such_task: no task of lm-eval"):
        find_tasks(["piqa", "no_such_task"])
    with pytest.raises(EvaluationError, match=r"--task-dir .*none: no such directory"):
        find_tasks(["piqa"], tmp_path / "none")
    (tmp_path / "choice.yaml").write_text(CHOICE.format(data=tmp_path / "missing.jsonl"))
    with pytest.raises(EvaluationError, match="--tasks tiny_choice: its data cannot be had"):
        find_tasks(["tiny_choice"], tmp_path)

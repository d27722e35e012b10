"""Many prompts through few rows: each as if it were alone, results in order, and gone on with after an interrupt."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.streaming import StreamingPattern
from megatron_sep.data.tokenizer import Tokenizer, load_tokenizer
from megatron_sep.generate.attach import attach
from megatron_sep.generate.many import Many, Result
from megatron_sep.generate.results import ResultsError, ResultsFile, read_many
from megatron_sep.generate.sampler import Continuation, Sampling
from megatron_sep.generate.sampling import draw_rows, uniform

SEP = AttentionPattern(window=6, sinks=2, separator_ids=tuple(range(5, 30)))
STREAM = StreamingPattern(2, 4, 6, 16, tuple(range(5, 30)))
PROMPTS = ["The cat sat, as cats do; " * n + "and the dog" for n in (1, 4, 2, 6, 1, 3, 2, 5, 1)]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, intermediate_size=48, num_key_value_heads=2, **sizes)
    made = LlamaForCausalLM(config).eval().double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def many(model: Any, tokenizer: Tokenizer, policy: Any, rows: int, sampling: Sampling) -> Many:
    return Many(attach(model, policy), model, tokenizer, sampling, rows)


DENSE = StreamingPattern(2, 4, 6, 16, tuple(range(5, 30)), "cache", "dense")


@pytest.mark.parametrize("policy", [SEP, STREAM, DENSE])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_each_is_as_if_it_were_alone(model: Any, tokenizer: Tokenizer, policy: Any, temperature: float) -> None:
    """Nine prompts of unequal length in four rows, and each in a run of its own; some end early: rows change hands."""
    sampling = Sampling(max_tokens=25, temperature=temperature, seed=3)
    found = {each.number: each for each in many(model, tokenizer, policy, 4, sampling).run(enumerate(PROMPTS))}
    assert sorted(found) == list(range(9))
    for number, prompt in enumerate(PROMPTS):
        (alone,) = many(model, tokenizer, policy, 1, sampling).run([(number, prompt)])
        assert (found[number].text, found[number].tokens) == (alone.text, alone.tokens)
    assert temperature == 0 or found[0].text != found[4].text  # the same prompt at two places


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_texts_that_end_at_once_leave_no_prompt_behind(model: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Where the first token of every text is its last, all prompts have a result, those that waited too."""
    sampling = Sampling(max_tokens=5, temperature=0)
    cache = attach(model, SEP).new_cache()
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        first = int(model(ids, past_key_values=cache).logits[0, -1, : tokenizer.vocab_size].argmax())
    ending = EndsWith(tokenizer, first)
    found = list(many(model, ending, SEP, rows, sampling).run(enumerate([PROMPTS[0]] * 5)))  # type: ignore[arg-type]
    assert [(each.number, each.tokens, each.ended) for each in found] == [(number, 0, True) for number in range(5)]


class EndsWith:
    """A tokenizer whose end-of-document token is another one."""

    def __init__(self, tokenizer: Tokenizer, token: int) -> None:
        self.encode, self.decode, self.vocab_size = tokenizer.encode, tokenizer.decode, tokenizer.vocab_size
        self.eod_id = token


def test_rows_are_never_empty_while_prompts_wait(model: Any, tokenizer: Tokenizer) -> None:
    """Steps are those of the best packing: 9 texts of 10 tokens in 3 rows take 27, the prompts' own logits give 9."""
    made, steps = many(model, tokenizer, SEP, 3, Sampling(max_tokens=10, temperature=0)), []
    made.tokenizer = NeverEnds(tokenizer)  # type: ignore[assignment]
    step = made._decoder.step
    made._decoder.step = lambda ids: steps.append(ids) or step(ids)  # type: ignore[method-assign, func-returns-value]
    assert [each.tokens for each in made.run(enumerate(PROMPTS))] == [10] * 9
    assert len(steps) == 27


class NeverEnds:
    """A tokenizer whose last token is one that is not drawn."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.eod_id, self.vocab_size = tokenizer, tokenizer.vocab_size - 1, tokenizer.vocab_size - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


SETTINGS = {"model": "m", "seed": 0}


def some_results(order: list[int]) -> Iterator[Result]:
    yield from (Result(n, f"p{n}", f"t{n}\n", n, True, 0.1) for n in order)


def test_results_stand_in_the_order_of_prompts_and_are_gone_on_from(tmp_path: Path) -> None:
    """Whatever order they come in; a line cut off by a kill is made anew, and the file ends as if never interrupted."""
    path, prompts = tmp_path / "out.jsonl", [f"p{n}" for n in range(5)]
    with ResultsFile(path, prompts, SETTINGS) as results:
        list(results.write(some_results([2, 0, 1, 4])))
    whole = path.read_text()
    assert [json.loads(line).get("prompt") for line in whole.splitlines()] == [None, "p0", "p1", "p2"]
    path.write_text(whole[:-9])
    with ResultsFile(path, prompts, SETTINGS) as results:
        assert [number for number, _ in results.left()] == [2, 3, 4]
        list(results.write(some_results([4, 3, 2])))
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()[1:]] == [f"t{n}\n" for n in range(5)]


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    """Of other prompts or settings, of no results, and one that is being written; nothing of it is changed."""
    path, prompts = tmp_path / "out.jsonl", ["p0", "p1"]
    with ResultsFile(path, prompts, SETTINGS) as results:
        list(results.write(some_results([0])))
        with pytest.raises(ResultsError, match="another process writes it"), ResultsFile(path, prompts, SETTINGS):
            pass
    before = path.read_bytes()
    with pytest.raises(ResultsError, match="line 2: is of another prompt"), ResultsFile(path, ["x", "p1"], SETTINGS):
        pass
    with pytest.raises(ResultsError, match="was made with seed 0"), ResultsFile(path, prompts, SETTINGS | {"seed": 1}):
        pass
    assert path.read_bytes() == before
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\n")
    with pytest.raises(ResultsError, match="line 1: is no result"), ResultsFile(notes, prompts, SETTINGS):
        pass
    assert notes.read_text() == "my notes\n"


def test_prompts_of_several_lines(tmp_path: Path) -> None:
    """In JSON lines, as strings or objects; wrong lines are named."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one\\ntwo"\n{"prompt": "three"}\n')
    assert read_many(path) == ["one\ntwo", "three"]
    path.write_text('"one"\n{"text": "three"}\n')
    with pytest.raises(ResultsError, match='line 2: pass a string, or an object with a string "prompt"'):
        read_many(path)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Of 40,000 rows, within 4 standard deviations; nothing beyond top_k and top_p; a seed gives its own tokens."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0]).expand(40_000, -1)
    numbers, counts = torch.arange(40_000), torch.full((40_000,), 7)
    for top_k, top_p, kept in ((0, 1.0, 5), (3, 1.0, 3), (0, 0.8, 2)):
        drawn = draw_rows(logits, Sampling(temperature=1, top_k=top_k, top_p=top_p, seed=5), numbers, counts)
        expected = logits[0].softmax(0)[:kept] / logits[0].softmax(0)[:kept].sum()
        found = torch.bincount(drawn, minlength=5).double() / 40_000
        assert not found[kept:].any()
        assert bool(((found[:kept] - expected).abs() < 4 * (expected * (1 - expected) / 40_000).sqrt()).all())
    assert not torch.equal(uniform(1, numbers, counts), uniform(2, numbers, counts))
    assert not torch.equal(uniform(1, numbers, counts), uniform(1, numbers, counts + 1))


def test_a_row_is_drawn_alike_beside_one_that_needs_all_tokens() -> None:
    """Of 2,000 tokens a flat row has to look at all, a peaked one at a few; many of them are equally likely."""
    generator = torch.Generator().manual_seed(0)
    flat, peaked = torch.zeros(2000), torch.randint(-8, 9, (2000,), generator=generator).float()
    sampling, two = Sampling(temperature=1, top_p=0.9, seed=1), torch.arange(2)
    for count in range(50):
        counts = torch.full((2,), count)
        both = draw_rows(torch.stack([flat, peaked]), sampling, two, counts)
        assert both[1] == draw_rows(peaked[None], sampling, two[1:], counts[1:])[0]
        assert abs(int(both[0]) - 1800 * float(uniform(1, two[:1], counts[:1]))) < 2


def test_a_token_is_decoded_with_the_last_few_alone(tokenizer: Tokenizer) -> None:
    """The pieces are the text, characters of several tokens too, and the work for one does not grow with the text."""
    text = "Ünïcödé — “quoted”; the cat sat 𝄞 on it.\n" * 20
    most, decode = [], tokenizer.decode

    class Counting:
        eod_id = tokenizer.eod_id

        def decode(self, ids: list[int]) -> str:
            most.append(len(ids))
            return decode(ids)

    continuation = Continuation(Counting(), torch.Generator())  # type: ignore[arg-type]
    assert "".join(continuation.add(token) for token in tokenizer.encode(text)) == text
    assert max(most) < 12


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [SEP, STREAM, DENSE])
def test_a_captured_step_serves_rows_that_change_hands(model: Any, tokenizer: Tokenizer, policy: Any) -> None:
    """On a GPU, in one CUDA graph, the texts are those of the CPU: greedily, in fp32, with room for ties."""
    sampling = Sampling(max_tokens=40, temperature=0)
    expected = {each.number: each.text for each in many(model, tokenizer, policy, 1, sampling).run(enumerate(PROMPTS))}
    attach(model, policy).detach()
    moved = deepcopy(model).float().cuda()
    made = many(moved, tokenizer, policy, 4, sampling)
    found = {each.number: each.text for each in made.run(enumerate(PROMPTS))}
    assert made._decoder._graph is not None
    assert sorted(expected) == sorted(found) == list(range(len(PROMPTS)))
    assert sum(found[number] == text for number, text in expected.items()) >= 8

"""F20: many texts through one model at once, some of which end early or are nothing that anyone should send."""

import threading
from random import Random
from typing import Any

from faults.case import Times, Trial, WrongError, expect
from faults.killing import told
from faults.verbs import call
from faults.world import World

_STREAMING = "2,8,16,40"


def _prompt(random: Random) -> str:
    """Of 1 to 200 words, with separators or without."""
    words = random.choices(("alpha", "beta", "gamma", "delta", "one", "Ünï", "\n", "0"), k=random.randint(1, 200))
    return random.choice((" ", ", ", ".")).join(words)


def _session(world: World, random: Random) -> Any:
    """The straight run's model, under its own mask or with a cache of bounded size."""
    from megatron_sep.generate.session import open_session

    return open_session(world.straight, None, random.choice((None, _STREAMING)), None)


def _text(session: Any, prompts: list[str], sampling: Any, pieces: int | None = None) -> str:
    """What is shown, or its first pieces: a reader that goes away after them."""
    shown = session.shown(prompts, sampling, session.attachment.new_cache())
    found = []
    for number, piece in enumerate(shown):
        if number == pieces:
            shown.close()
            break
        found.append(piece)
    return "".join(found)


def concurrent(trial: Trial) -> Times:
    """Streams of one model: threads, ragged batches, readers that go away, a long prompt, bytes that are no text."""
    kinds = (_threads, _ragged_batch, _threads, _long_prompt, _no_text)
    kinds[trial.number % len(kinds)](trial)
    return Times()


def _threads(trial: Trial) -> None:
    """Each text that is read to its end is the one that its prompt gives alone."""
    from megatron_sep.generate.sampler import Sampling

    random = trial.random
    session = _session(trial.world, random)
    count = random.randint(2, 6)
    prompts = [_prompt(random) for _ in range(count)]
    samplings = [Sampling(random.randint(1, 24), seed=random.randrange(99)) for _ in range(count)]
    leave = [random.choice((None, random.randint(0, 9))) for _ in range(count)]
    alone = [_text(session, [p], s, n) for p, s, n in zip(prompts, samplings, leave, strict=True)]
    together: list[str] = [""] * count

    def run(index: int) -> None:
        together[index] = _text(session, [prompts[index]], samplings[index], leave[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if together != alone:
        raise WrongError("a stream beside others gives another text")


def _ragged_batch(trial: Trial) -> None:
    """Rows of one batch, after another one was left in the middle."""
    from megatron_sep.generate.sampler import Sampling

    random = trial.random
    session, sampling = _session(trial.world, random), Sampling(random.randint(1, 24), seed=random.randrange(99))
    prompts = [_prompt(random) for _ in range(random.randint(2, 5))]
    _text(session, [prompts[0]], sampling, pieces=2)
    cache = session.attachment.new_cache()
    together = "".join(session.shown(prompts, sampling, cache))
    alone = [_text(session, [prompt], sampling).removesuffix("\n") for prompt in prompts]
    if together != "".join(f"== {number}\n{text}\n" for number, text in enumerate(alone, 1)):
        raise WrongError("a row beside others gives another text")


def _long_prompt(trial: Trial) -> None:
    """Thousands of times the cache's capacity, or a text without a separator: the memory is that of the capacity."""
    import resource

    from megatron_sep.generate.sampler import Sampling
    from megatron_sep.generate.session import open_session

    session = open_session(trial.world.straight, None, _STREAMING, None)
    word = trial.random.choice(("alpha ", "alpha, ", "....", "x"))
    cache = session.attachment.new_cache()
    "".join(session.shown([word * 200], Sampling(2), cache))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = session.attachment.new_cache()
    "".join(session.shown([word * (120_000 // len(word))], Sampling(2), cache))
    capacity = int(_STREAMING.rpartition(",")[2])
    expect(cache.retention().live < capacity, f"{cache.retention()}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    expect(grown < 150_000, f"grew by {grown / 1e3:.0f} MB")


def _no_text(trial: Trial) -> None:
    """Bytes that are no UTF-8, NUL, nothing: a text, or one message."""
    prompt = trial.random.choice(("\udcff\udc00", "a\udce4", "", "<|endoftext|>", "\u200d" * 500))
    ended = call(trial.folder / "log", "generate", trial.world.straight, "--prompt", prompt, "--max-tokens", "3")
    if ended.code:
        told(ended, 2, "--prompt")

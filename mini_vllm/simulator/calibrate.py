"""Measure steps of the real engine on this machine, and fit a cost model to them.

Uses the benchmark's own driver, so a step's seconds are what they are there: planning, computing, sampling, text. The
request sets are chosen to spread the features apart: prompts alone from short to long, batches that drain from full to
one at short and at long contexts, and a queue that keeps prompts and decodes in the same steps.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.cost import FittedCost, StepLoad
from mini_vllm.simulator.fit import Sample, fit_cost

if TYPE_CHECKING:
    from mini_vllm.bench.datasets import BenchRequest
    from mini_vllm.bench.driver import Run
    from mini_vllm.engine.llm_engine import LLMEngine

Progress = Callable[[str, int, int], None]
"""Told (what is measured, which it is, of how many)."""

LEAST_MODEL_LEN = 16
MAX_BATCH = 64
"""Sequences in a draining batch: enough to tell what a request costs, and quick on a CPU."""

MAX_DRAIN = 64
"""Steps it drains in."""
MAX_MIXED = 256
"""Tokens of the longest prompt among decodes."""

MAX_ALONE = 2048
"""Tokens of the longest prompt that is measured alone."""


def calibrate(
    engine: "LLMEngine",
    *,
    temperature: float = 1.0,
    detokenize: bool = True,
    repeats: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> FittedCost:
    """Run the sets on an engine that has nothing else to do. Raises `ConfigError` when its context is too short.

    detokenize: whether making text is part of a step, as it is in this process, and is not where a server makes it.
    """
    samples = measure_steps(
        engine, temperature=temperature, detokenize=detokenize, repeats=repeats, seed=seed, progress=progress
    )
    return fit_cost(samples, _about(engine, temperature) | {"detokenize": detokenize})


def measure_steps(
    engine: "LLMEngine",
    *,
    temperature: float = 1.0,
    detokenize: bool = True,
    repeats: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Sample]:
    """(load, median seconds over the repeats) of every step of every set, after one that warms up."""
    from mini_vllm.bench.driver import Driver
    from mini_vllm.bench.throughput import usable_token_ids

    if repeats < 1:
        raise ConfigError(f"repeats: must be at least 1, got {repeats}")
    maker = _Sets(usable_token_ids(engine), engine.max_model_len, _max_batch(engine), seed)
    driver = Driver(engine, temperature=temperature, detokenize=detokenize)
    driver.run(maker.mixed())
    sets = list(maker.all())
    measured: list[list[list[Sample]]] = [[] for _ in sets]
    for turn in range(repeats):  # one after the other, so that a busy minute does not spoil all of a set
        for number, (name, requests) in enumerate(sets):
            if progress is not None:
                progress(name, turn * len(sets) + number + 1, repeats * len(sets))
            run = driver.run(requests)
            if run.errors:
                raise ConfigError(f"calibrate: a request failed: {run.errors[0]}")
            measured[number].append(samples_of(run))
    return [sample for runs in measured for sample in typical_steps(runs)]


def typical_steps(runs: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Runs of one set have the same steps: of each the load, and the median of its seconds."""
    return [(steps[0][0], median(seconds for _, seconds in steps)) for steps in zip(*runs, strict=True)]


def samples_of(run: "Run") -> list[Sample]:
    """The steps of a benchmark run, as what a cost model is asked and what it should have said."""
    return [(StepLoad.of(note.chunks, note.sampled_rows), note.seconds) for note in run.steps]


def _max_batch(engine: "LLMEngine") -> int:
    from mini_vllm.bench.driver import core_of

    return min(MAX_BATCH, core_of(engine).scheduler.config.max_num_seqs)


def _about(engine: "LLMEngine", temperature: float) -> dict[str, Any]:
    from mini_vllm.bench.driver import core_of
    from mini_vllm.bench.environment import collect_environment

    environment, config = collect_environment(), core_of(engine).scheduler.config
    return {
        "cpu": environment["cpu"],
        "device": environment["device"],
        "versions": environment["versions"],
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "temperature": temperature,
    }


class _Sets:
    """Request sets that fit a context of `max_len` tokens and batches of `max_batch`."""

    def __init__(self, token_ids: Sequence[int], max_len: int, max_batch: int, seed: int) -> None:
        if max_len < LEAST_MODEL_LEN:
            raise ConfigError(
                f"max_model_len: {max_len} tokens are too few to calibrate with, at least {LEAST_MODEL_LEN} are needed"
            )
        self._token_ids = token_ids
        self._max_len = max_len
        self._max_batch = max_batch
        self._rng = random.Random(seed)

    def all(self) -> Iterator[tuple[str, list["BenchRequest"]]]:
        longest = min(self._max_len - 2, MAX_ALONE)
        length = 1
        while length < longest:
            yield f"a prompt of {length} tokens", [self._request(length, 2)]
            length *= 2
        yield f"a prompt of {longest} tokens", [self._request(longest, 2)]
        steps = min(MAX_DRAIN, self._max_len // 2)
        for prompt in sorted({4, self._max_len // 8, self._max_len // 2 - 1}):
            yield f"a batch draining at {prompt} tokens", self._draining(max(prompt, 1), steps)
        yield "prompts among decodes", self.mixed()

    def mixed(self) -> list["BenchRequest"]:
        """More than fit a batch, of all lengths: prompts come in while others decode."""
        limit = min(self._max_len // 2, MAX_MIXED)
        return [
            self._request(self._rng.randint(1, limit), self._rng.randint(1, min(limit, MAX_DRAIN)))
            for _ in range(3 * self._max_batch // 2)
        ]

    def _draining(self, prompt: int, steps: int) -> list["BenchRequest"]:
        """All begin together and end one after the other."""
        size = self._max_batch
        return [self._request(prompt, max(1, steps * (place + 1) // size)) for place in range(size)]

    def _request(self, prompt: int, output: int) -> "BenchRequest":
        from mini_vllm.bench.datasets import BenchRequest, random_tokens

        return BenchRequest(random_tokens(self._rng, self._token_ids, prompt), output)

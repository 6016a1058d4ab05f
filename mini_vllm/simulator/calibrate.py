"""Measure steps of the real engine on this machine, and fit a cost model to them.

A step's seconds are those of the whole `LLMEngine.step()`: planning, computing, sampling, text. Every set of
`calibration_sets` is run once to warm the engine up and to see how long it takes, then all of them in turn until the
time is over, so that a busy second spoils one run of a few sets. Of steps that computed the same, what counts is how
long they take when nothing else slows the machine: see `undisturbed`.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.calibration_sets import RequestSet, SetMaker, TokenMaker
from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.fit import Sample, fit_cost, nonnegative_least_squares
from mini_vllm.simulator.fitted import FittedCost

if TYPE_CHECKING:
    from mini_vllm.bench.driver import StepNote
    from mini_vllm.engine.llm_engine import LLMEngine

Progress = Callable[[str, int, int], None]
"""Told (what is measured, seconds passed, of how many)."""

DEFAULT_SECONDS = 40.0
LEAST_ROUNDS = 3
MOST_ROUNDS = 25
LARGEST_SHARE = 0.04
"""Of the time that one run of one set may take; sets behind one that takes longer are left out."""

DISTURBED = 1.15
"""A step that took longer than this many times what its like take had the machine not for itself."""

LoadKey = tuple[Any, ...]


def calibrate(
    engine: "LLMEngine",
    *,
    temperature: float = 1.0,
    detokenize: bool = True,
    seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> FittedCost:
    """Measure an engine that has nothing else to do, for about so long. Raises `ConfigError` when its context is too
    short.

    detokenize: whether making text is part of a step, as it is in this process, and is not where a server makes it.
    """
    measured = measure_steps(
        engine, temperature=temperature, detokenize=detokenize, seconds=seconds, seed=seed, progress=progress
    )
    return fit_cost(
        measured.samples(),
        _about(engine, temperature) | {"detokenize": detokenize, "rounds": measured.rounds},
        adding=measured.adding(),
        slowdown=measured.slowdown(),
        quality={"disturbed_share": measured.disturbed_share()},
    )


@dataclass
class Measured:
    """Seconds of steps that computed the same, and of adding requests by the length of their prompts."""

    steps: dict[LoadKey, tuple[StepLoad, list[float]]] = field(default_factory=dict)
    adds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    rounds: int = 0

    def add_steps(self, notes: Iterable["StepNote"]) -> None:
        for note in notes:
            load = StepLoad.of(note.chunks, note.sampled_rows)
            key = (len(load.starts), sum(load.starts), tuple(sorted(load.chunks)), load.num_sampled)
            self.steps.setdefault(key, (load, []))[1].append(note.seconds)

    def samples(self) -> list[Sample]:
        """Steps that came only once by chance are left out, where there are others."""
        least = 2 if self.rounds > 1 else 1
        return [(load, undisturbed(seconds)) for load, seconds in self.steps.values() if len(seconds) >= least]

    def adding(self) -> tuple[float, float]:
        """Seconds of adding a request, and of each token of its prompt."""
        lengths = [length for length, seconds in self.adds.items() if len(seconds) > 1]
        if not lengths:
            return 0.0, 0.0
        taken = np.array([undisturbed(self.adds[length]) for length in lengths])
        matrix = np.stack([np.ones(len(lengths)), np.array(lengths, dtype=np.float64)], axis=1)
        fixed, per_token = nonnegative_least_squares(matrix / taken[:, None], np.ones(len(lengths))).tolist()
        return fixed, per_token

    def slowdown(self) -> float:
        """How much longer steps took on average than undisturbed ones; where the machine stood still, thrice."""
        taken = calm = 0.0
        for _, seconds in self.steps.values():
            usual = undisturbed(seconds)
            taken += sum(min(each, 3 * usual) for each in seconds)
            calm += usual * len(seconds)
        return max(1.0, taken / calm) if calm else 1.0

    def disturbed_share(self) -> float:
        """Of all steps, those that something else slowed down."""
        slow = total = 0
        for _, seconds in self.steps.values():
            limit = DISTURBED * undisturbed(seconds)
            slow += sum(taken > limit for taken in seconds)
            total += len(seconds)
        return slow / max(total, 1)


def undisturbed(seconds: Sequence[float]) -> float:
    """What a step takes where nothing else slows the machine: the mean of those not far above the lower quartile.

    On a quiet machine that is nearly all of them. A median would say how busy others were during this minute.
    """
    limit = DISTURBED * float(np.percentile(seconds, 25))
    return float(np.mean([taken for taken in seconds if taken <= limit]))


def measure_steps(
    engine: "LLMEngine",
    *,
    temperature: float = 1.0,
    detokenize: bool = True,
    seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Run every set that is quick enough, over and over, until `seconds` have passed (but a few times at least)."""
    if not seconds > 0:
        raise ConfigError(f"seconds: must be above 0, got {seconds}")
    runner, begin = _Runner(engine, temperature, detokenize, seed), time.perf_counter()

    def tell(name: str) -> None:
        if progress is not None:
            progress(name, round(min(time.perf_counter() - begin, seconds)), round(seconds))

    engine.reset_prefix_cache()
    sets = _quick_enough(runner, _sets_for(engine), LARGEST_SHARE * seconds, tell)
    measured = Measured()
    while measured.rounds < LEAST_ROUNDS or time.perf_counter() - begin < seconds:
        if measured.rounds == MOST_ROUNDS:
            break
        for each in sets:
            tell(each.name)
            runner.run(each, measured)
        measured.rounds += 1
    engine.reset_prefix_cache()
    return measured


def _quick_enough(
    runner: "_Runner", sets: Sequence[RequestSet], limit: float, tell: Callable[[str], None]
) -> list[RequestSet]:
    """Those that are run again, once the first run has warmed the engine up (and filled the cache for some)."""
    kept: list[RequestSet] = []
    too_slow: set[str] = set()
    for each in sets:
        if each.family in too_slow:
            continue
        tell(each.name)
        unmeasured = Measured()
        taken = runner.run(each, unmeasured)
        if each.is_cached and taken <= 3 * limit:
            taken = runner.run(each, unmeasured)
        if taken <= limit or each.family not in {other.family for other in kept}:
            kept.append(each)  # of each family at least the smallest
        if taken > limit:
            too_slow.add(each.family)
    return kept


class _Runner:
    """Runs sets through an engine, in a prefix cache that is left as it is."""

    def __init__(self, engine: "LLMEngine", temperature: float, detokenize: bool, seed: int) -> None:
        from mini_vllm.bench.throughput import usable_token_ids

        self.engine = engine
        self.temperature = temperature
        self.detokenize = detokenize
        self._tokens = TokenMaker(usable_token_ids(engine), seed)
        self._num_requests = 0

    def run(self, requests: RequestSet, measured: Measured) -> float:
        """Seconds that it took. Raises `ConfigError` when a request fails."""
        from mini_vllm.bench.driver import core_of, metered

        staged = sorted(requests.requests, key=lambda request: -request.at)
        prompts = [self._tokens.tokens(request) for request in staged]
        begin, steps, clock = time.perf_counter(), 0, time.perf_counter
        with metered(core_of(self.engine)) as meter:
            while staged or self.engine.has_unfinished_requests():
                while staged and (staged[-1].at <= steps or not self.engine.has_unfinished_requests()):
                    self._add(prompts.pop(), staged.pop().output_len, measured)
                num_notes, start = len(meter.notes), clock()
                outputs = self.engine.step()
                end = clock()
                steps += 1
                if len(meter.notes) > num_notes:
                    meter.notes[-1].seconds = end - start
                if failed := [output.error for output in outputs if output.error]:
                    raise ConfigError(f"calibrate: a request failed: {failed[0]}")
        measured.add_steps(note for note in meter.notes if note.seconds)
        return clock() - begin

    def _add(self, prompt: list[int], output_len: int, measured: Measured) -> None:
        from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

        self._num_requests += 1
        params = SamplingParams(
            temperature=self.temperature, max_tokens=output_len, ignore_eos=True, detokenize=self.detokenize,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        begin = time.perf_counter()
        self.engine.add_request(f"calibrate-{self._num_requests}", {"prompt_token_ids": prompt}, params)
        measured.adds[len(prompt)].append(time.perf_counter() - begin)


def _sets_for(engine: "LLMEngine") -> list[RequestSet]:
    from mini_vllm.bench.driver import core_of

    scheduler = core_of(engine).scheduler
    config, kv = scheduler.config, scheduler.kv
    budget = config.max_num_batched_tokens
    if config.long_prefill_token_threshold:
        budget = min(budget, config.long_prefill_token_threshold)
    tokens = kv.block_pool.num_usable_blocks // max(kv.num_blocks_for(1), 1) * kv.block_size
    return SetMaker(engine.max_model_len, config.max_num_seqs, budget, tokens).all()


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

"""How fast the machine itself was while something ran on it.

A virtual machine shares its cores with others who cannot be seen from inside: the same step takes half as long again
for a tenth of a second or for ten. `Probe` times a small product of matrices every now and then, which says how fast
the core is at that moment and knows nothing of the engine. How a slower probe shows in a step is learnt from steps
that all compute the same (`learn`). `Weather` is a run's slowdown over time; under it a simulated step takes as much
longer as a real one did. So an error of the simulator can be told from a disturbance of the machine.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.simulator.calibrate import undisturbed
from mini_vllm.simulator.cost import StepLoad
from mini_vllm.simulator.driver import Simulation
from mini_vllm.simulator.executor import LogicalClock
from mini_vllm.simulator.fitted import FittedCost

BIN_SECONDS = 0.1
PROBE_EVERY_SECONDS = 0.02
STEADY = 0.03
"""Probes that vary less than this (standard deviation of the logarithm) teach nothing: then a step slows as they do."""


class Probe:
    """A product of small matrices, twice. notes: (when, seconds it took)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._left, self._right = torch.ones(96, 128), torch.ones(128, 128)
        self._clock = clock
        self.notes: list[tuple[float, float]] = []

    def __call__(self) -> None:
        """Unless it was done just now."""
        begin = self._clock()
        if self.notes and begin - self.notes[-1][0] < PROBE_EVERY_SECONDS:
            return
        for _ in range(2):
            torch.mm(self._left, self._right)
        self.notes.append((begin, self._clock() - begin))


@dataclass(frozen=True)
class Climate:
    """calm_seconds: a probe on an undisturbed machine. exponent: a step slows as the probe to this power.

    left: what of the disturbance of equal steps that does not explain, as standard deviations: (before, after).
    """

    calm_seconds: float
    exponent: float
    left: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Weather:
    """Slowdown of steps at each of the times, 1 on a calm machine."""

    times: Sequence[float]
    slowdown: Sequence[float]

    @classmethod
    def of(cls, notes: Sequence[tuple[float, float]], climate: Climate) -> "Weather":
        times, probes = binned(notes, climate.calm_seconds)
        return cls(times.tolist(), np.maximum(1.0, probes**climate.exponent).tolist())

    def at(self, when: float) -> float:
        return float(np.interp(when, self.times, self.slowdown))

    @property
    def mean(self) -> float:
        return float(np.mean(self.slowdown))


def binned(notes: Sequence[tuple[float, float]], calm: float) -> tuple[Any, Any]:
    """(middles of the tenths of a second that have notes, mean of what these say there as a multiple of `calm`)."""
    bins: dict[int, list[float]] = defaultdict(list)
    for when, seconds in notes:
        bins[math.floor(when / BIN_SECONDS)].append(min(seconds / calm, 3.0))
    places = sorted(bins)
    return (np.array(places) + 0.5) * BIN_SECONDS, np.array([np.mean(bins[place]) for place in places])


def learn(engine: LLMEngine, token_ids: Sequence[int], seconds: float) -> Climate:
    """Let eight requests decode over and over, and lay steps beside probes."""
    probe, steps, begin, round_number = Probe(), defaultdict(list), time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or round_number < 3:
        round_number += 1
        params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
        for number in range(8):
            prompt = [token_ids[(round_number + number * 7) % len(token_ids)]] * 16
            engine.add_request(f"weather-{round_number}-{number}", {"prompt_token_ids": prompt}, params)
        place = 0
        while engine.has_unfinished_requests():
            probe()
            start = time.perf_counter()
            engine.step()
            steps[min(place, 1)].append((start, time.perf_counter() - start))
            place += 1
    return fit_climate(probe.notes, list(steps.values()))


def fit_climate(probes: Sequence[tuple[float, float]], kinds: Sequence[Sequence[tuple[float, float]]]) -> Climate:
    """kinds: (when, seconds) of steps that compute the same."""
    calm = undisturbed([seconds for _, seconds in probes])
    bases = [undisturbed([seconds for _, seconds in steps]) for steps in kinds]
    relative = [(when, taken / base) for steps, base in zip(kinds, bases, strict=True) for when, taken in steps]
    when, slow = binned(relative, 1.0)
    x, y = np.log(np.interp(when, *binned(probes, calm))), np.log(slow)
    if x.std() < STEADY:
        return Climate(calm, 1.0, (float(y.std()), float(y.std())))
    exponent = float(np.clip((x @ y) / (x @ x), 0.0, 1.5))
    return Climate(calm, exponent, (float(y.std()), float((y - exponent * x).std())))


class WeatheredCost:
    """A fitted cost under the weather of a run, in place of the average weather that was while it was measured."""

    def __init__(self, cost: FittedCost, clock: LogicalClock, weather: Weather) -> None:
        self._cost, self._clock, self._weather = replace(cost, slowdown=1.0), clock, weather

    def step_seconds(self, load: StepLoad) -> float:
        return float(self._cost.step_seconds(load) * self._weather.at(self._clock.now))

    def add_seconds(self, num_prompt_tokens: int) -> float:
        return float(self._cost.add_seconds(num_prompt_tokens) * self._weather.at(self._clock.now))

    def describe(self) -> dict[str, Any]:
        return dict(self._cost.describe())


def expose(simulation: Simulation, weather: Weather) -> None:
    """Let it run under this weather."""
    for replica in simulation.replicas:
        cost = replica.executor.cost
        assert isinstance(cost, FittedCost)
        replica.executor.cost = WeatheredCost(cost, replica.clock, weather)

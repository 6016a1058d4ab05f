"""Slices of engines in alternating order, and the probes beside them.

Every engine with every width is a process that stays. A round gives each of them the same task in turn, forwards in one
round and backwards in the next, so that a machine whose speed drifts drifts for all. A worker that fails or dies is
noted with its last word, and the others go on.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cpu.tasks import Task
from benchmarks.cpu.workers import Entrant, Setting, Worker, WorkerError
from mini_vllm.bench.noise import CpuMeter

PAUSE_SECONDS = 0.25
"""Between slices: threads of the engine before may still spin."""
SLOW_SLICE = 20.0
"""Seconds above which a slice is said to be slow while the rest is still to come."""
WARM_UP = -1
"""The round whose slices are thrown away."""
WARM_UP_PROMPT, WARM_UP_OF_MANY = 1024, 16
"""Tokens of the only prompt, and of each of several, that a warm-up runs at most."""

Probe = Callable[[], dict[str, float]]


@dataclass
class Outcome:
    """What was measured. slices: one for each task, entrant and round, with its figure or its error."""

    entrants: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    slices: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, float]] = field(default_factory=list)
    rounds: int = 0
    interrupted: bool = False


@dataclass
class Budget:
    """Time that groups share out: what one leaves goes to those after it. weights: of all groups to come."""

    deadline: float
    weights: float

    def take(self, weight: float) -> float:
        """Seconds for the next group."""
        share = (self.deadline - time.monotonic()) * weight / self.weights
        self.weights -= weight
        return share


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def run_group(
    entrants: Sequence[Entrant],
    tasks: Sequence[Task],
    setting: Setting,
    probe: Probe,
    outcome: Outcome,
    *,
    rounds: int,
    seconds: float,
) -> None:
    """Start all entrants, run rounds, stop them. seconds: no further round begins that would end after so long."""
    deadline = time.monotonic() + seconds
    workers = start_all(entrants, setting, outcome)
    try:
        warm_up_all(workers, tasks, outcome)
        for number in range(rounds):
            begin = time.monotonic()
            outcome.probes.append(probe())
            run_round(workers, tasks, number, outcome)
            took = time.monotonic() - begin
            outcome.rounds = max(outcome.rounds, number + 1)
            say(f"round {number + 1}: {took:.0f} s, {outcome.probes[-1]}")
            if number + 1 < rounds and time.monotonic() + took > deadline:
                say(f"{number + 1} of {rounds} rounds: more would take longer than was given (--minutes)")
                break
    except KeyboardInterrupt:
        outcome.interrupted = True
        say("interrupted: what was measured so far is kept")
    finally:
        for worker in workers:
            worker.stop()


def start_all(entrants: Sequence[Entrant], setting: Setting, outcome: Outcome) -> list[Worker]:
    """Those that started; why the others did not is in `outcome.failures`."""
    workers = []
    for entrant in entrants:
        begin = time.monotonic()
        try:
            worker = Worker.start(entrant, setting)
        except WorkerError as error:
            outcome.failures[entrant.name] = str(error)
            say(f"failed: {entrant.name}: {error}")
            continue
        workers.append(worker)
        took = time.monotonic() - begin
        outcome.entrants[entrant.name] = {"version": worker.version, "start_seconds": round(took, 1), **worker.details}
        say(f"started {entrant.name} {worker.version} in {took:.0f} s")
    return workers


def warm_up_all(workers: Sequence[Worker], tasks: Sequence[Task], outcome: Outcome) -> None:
    """Warm up, and note how many of the first tokens are those of the first engine: a wrong conversion shows here."""
    expected: list[int] = []
    for worker in workers:
        firsts = warm_up(worker, tasks, outcome)
        expected = expected or firsts
        same = sum(a == b for a, b in zip(firsts, expected, strict=False))
        outcome.entrants[worker.entrant.name]["same_first_tokens"] = [same, len(expected)]


def warm_up(worker: Worker, tasks: Sequence[Task], outcome: Outcome) -> list[int]:
    """Every shape of call once, the start of its prompts, 3 tokens: first calls compile and allocate.

    Returns the first token of every completion.
    """
    firsts = []
    for task in tasks:
        prompts, tokens = task.calls(WARM_UP)[0]
        try:
            most = WARM_UP_PROMPT if len(prompts) == 1 else WARM_UP_OF_MANY
            completed = worker.complete([p[:most] for p in prompts], [min(count, 3) for count in tokens])
            firsts += [made[0] for made in completed.made]
        except WorkerError as error:
            outcome.failures[worker.entrant.name] = f"{task.name}: {error}"
    return firsts


def run_round(workers: Sequence[Worker], tasks: Sequence[Task], number: int, outcome: Outcome) -> None:
    for task in tasks:
        for worker in in_turn(workers, number):
            if not worker.alive:
                continue
            found = run_slice(worker, task, number)
            if "error" in found:
                outcome.failures[worker.entrant.name] = f"{task.name}: {found['error']}"
            outcome.slices.append(found)


def in_turn(workers: Sequence[Worker], number: int) -> list[Worker]:
    """A B C in even rounds, C B A in odd ones."""
    return list(workers) if number % 2 == 0 else list(reversed(workers))


def run_slice(worker: Worker, task: Task, number: int) -> dict[str, Any]:
    """One task by one engine: seconds of its calls, the figure or the error, and how many CPUs it and others used."""
    found: dict[str, Any] = {"task": task.name, "entrant": worker.entrant.name, "round": number}
    meter, before = CpuMeter().start(), worker.cpu_seconds()
    try:
        found["seconds"] = [worker.complete(prompts, tokens).seconds for prompts, tokens in task.calls(number)]
        found["figure"] = task.figure(found["seconds"])
        found["cpus"] = round((worker.cpu_seconds() - before) / sum(found["seconds"]), 2)
    except (WorkerError, ValueError) as error:
        found["error"] = str(error)
    if (took := sum(found.get("seconds", ()))) > SLOW_SLICE:
        say(f"{found['entrant']}: {task.name} took {took:.0f} s")
    found["others_share"] = meter.stop().others_share
    time.sleep(PAUSE_SECONDS)
    return found

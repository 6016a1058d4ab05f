"""What a step costs outside the model: schedule, prepare, sample, update, output, by number of running requests.

Two parts. `control` drives `EngineCore` with an executor that computes nothing: what is left is the control plane.
`model` drives `LLMEngine` with the bundled model, and the time inside the model (forward, logits) is taken apart
from the rest. Every phase is timed exclusively: a phase inside another is subtracted from it. All requests decode;
their lengths differ by up to a block, so that every step has its fair share of block boundaries.

Prints a table and writes one JSON file with versions, shapes, threads and the spread over repetitions.
"""

import argparse
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mini_vllm.config import SchedulerConfig
from mini_vllm.core.interfaces import KVCacheConfig, KVCacheGroup, KVCacheSpec
from mini_vllm.core.kv_cache_manager import KVCacheManager
from mini_vllm.core.scheduler import Scheduler
from mini_vllm.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from mini_vllm.engine.core import EngineCore
from mini_vllm.request import Request
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK_SIZE = 16
PROMPT_LEN = 16
VOCAB_SIZE = 2000
PREFILL_STEPS = 32
"""Steps that may pass before the last request decodes; the first ones decode meanwhile."""
INSIDE_MODEL = ("forward", "logits")
PHASES = ("schedule", "prepare", "forward", "logits", "sample", "update", "output", "rest")


# --- exclusive timing ---------------------------------------------------------------------------------------


@dataclass
class PhaseClock:
    """Seconds per phase of the current step; time of a phase entered inside another counts for the inner alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stack: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._stack.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            inner = self._stack.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - inner
            if self._stack:
                self._stack[-1] += elapsed

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Time `owner.method` as phase `name` from now on."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


# --- the two engines ------------------------------------------------------------------------------------------


class NullExecutor:
    """Obeys the plan without computing: every request that caught up gets token 1."""

    max_model_len = 2**31

    def __init__(self, num_blocks: int) -> None:
        spec = KVCacheSpec(block_size=BLOCK_SIZE, page_size_bytes=0, dtype="float32")
        self._config = KVCacheConfig(num_blocks, (KVCacheGroup(("null",), spec),))
        self._missing: dict[str, int] = {}

    def kv_cache_config(self) -> KVCacheConfig:
        return self._config

    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        for new in plan.new_reqs:
            self._missing[new.req_id] = len(new.token_ids) - new.num_computed_tokens
        req_ids = list(plan.num_scheduled_tokens)
        sampled = [self._advance(req_id, n) for req_id, n in plan.num_scheduled_tokens.items()]
        return ModelRunnerOutput(req_ids=req_ids, sampled_token_ids=sampled)

    def _advance(self, req_id: str, num_tokens: int) -> list[int]:
        self._missing[req_id] -= num_tokens
        if self._missing[req_id] > 0:
            return []
        self._missing[req_id] = 1
        return [1]

    def sample_tokens(self, grammar_output: Any = None) -> ModelRunnerOutput:
        raise AssertionError("execute_model never leaves a step open")

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        return [getattr(self, method)(*args, **kwargs)]

    def shutdown(self) -> None:
        self._missing.clear()


def prompt(rng: random.Random, index: int) -> list[int]:
    """Random ids, so that nothing is shared; lengths spread over one block."""
    return [rng.randrange(10, VOCAB_SIZE) for _ in range(PROMPT_LEN + index % BLOCK_SIZE)]


def blocks_needed(num_requests: int, num_steps: int) -> int:
    longest = PROMPT_LEN + BLOCK_SIZE + num_steps + 1
    return 1 + num_requests * (-(-longest // BLOCK_SIZE) + 1)


def params(num_steps: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=num_steps + BLOCK_SIZE,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )


Step = Callable[[], Any]


@dataclass
class Built:
    """An engine with its phases timed. facts: what the JSON should say about it."""

    clock: PhaseClock
    step: Step
    scheduler: Scheduler
    facts: dict[str, Any]


def build_control(num_requests: int, num_steps: int) -> Built:
    """An engine without a model."""
    num_blocks = blocks_needed(num_requests, num_steps)
    config = SchedulerConfig(max_num_batched_tokens=64 * 1024, max_num_seqs=num_requests)
    scheduler = Scheduler(config, KVCacheManager(num_blocks, BLOCK_SIZE))
    core = EngineCore(scheduler, NullExecutor(num_blocks))
    rng = random.Random(0)
    for index in range(num_requests):
        core.add_request(Request(str(index), prompt(rng, index), params(num_steps)))
    clock = PhaseClock()
    clock.wrap(scheduler, "schedule", "schedule")
    clock.wrap(core.executor, "execute_model", "forward")
    clock.wrap(scheduler, "update_from_output", "update")
    return Built(clock, core.step, scheduler, {"num_blocks": num_blocks})


def build_model(num_requests: int, num_steps: int, args: argparse.Namespace) -> Built:
    """An engine with the bundled model, or that of `--model`."""
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine

    options: dict[str, Any] = {"model": args.model} if args.model else {}
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            **options,
            dtype=args.dtype,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_requests,
            max_num_batched_tokens=4096,
            num_threads=args.threads,
            num_gpu_blocks_override=blocks_needed(num_requests, num_steps),
            max_model_len=PROMPT_LEN + BLOCK_SIZE + num_steps + BLOCK_SIZE,
        )
    )
    rng = random.Random(0)
    for index in range(num_requests):
        engine.add_request(str(index), {"prompt_token_ids": prompt(rng, index)}, params(num_steps))
    clock = PhaseClock()
    core = engine.engine_core.core
    runner = core.executor.runner
    clock.wrap(core.scheduler, "schedule", "schedule")
    clock.wrap(core.executor, "execute_model", "prepare")
    clock.wrap(core.executor, "sample_tokens", "sample")
    clock.wrap(runner.model, "forward", "forward")
    clock.wrap(runner.model, "compute_logits", "logits")
    clock.wrap(core.scheduler, "update_from_output", "update")
    clock.wrap(engine.output_processor, "process", "output")
    facts = {
        "num_blocks": core.executor.kv_cache_config().num_blocks,
        "dtype": engine.config.model.dtype,
        "hf_config": {k: v for k, v in engine.config.model.hf_config.raw.items() if isinstance(v, (int, float))},
        "threads": runner.num_threads,
    }
    return Built(clock, engine.step, core.scheduler, facts)


# --- measuring ------------------------------------------------------------------------------------------------


def measure(built: Built, num_requests: int, args: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds of each phase over steps in which all requests decode, with the spread."""
    clock, step, scheduler = built.clock, built.step, built.scheduler
    while len(scheduler.running) < num_requests or any(r.num_output_tokens == 0 for r in scheduler.running):
        step()
    for _ in range(args.warmup):
        step()
    repetitions = [timed_steps(clock, step, args.steps) for _ in range(args.repetitions)]
    assert len(scheduler.running) == num_requests, "a request ended during the measurement"
    phases = [name for name in PHASES if any(name in taken for rep in repetitions for taken in rep)]
    row: dict[str, Any] = {"num_requests": num_requests, **built.facts, "phases": {}}
    for name in phases:
        row["phases"][name] = spread([[taken.get(name, 0.0) for taken in rep] for rep in repetitions])
    outside = [[sum(s for n, s in taken.items() if n not in INSIDE_MODEL) for taken in rep] for rep in repetitions]
    row["outside_model"] = spread(outside)
    row["outside_model_us_per_request"] = round(row["outside_model"]["median_us"] / num_requests, 3)
    return row


def timed_steps(clock: PhaseClock, step: Step, num_steps: int) -> list[dict[str, float]]:
    taken = []
    clock.take()
    for _ in range(num_steps):
        with clock.phase("rest"):
            step()
        taken.append(clock.take())
    return taken


def spread(repetitions: list[list[float]]) -> dict[str, Any]:
    """Median, 10th and 90th percentile of all steps, and the median of each repetition, in microseconds."""
    values = sorted(value * 1e6 for repetition in repetitions for value in repetition)
    return {
        "median_us": round(statistics.median(values), 2),
        "p10_us": round(values[len(values) // 10], 2),
        "p90_us": round(values[len(values) * 9 // 10], 2),
        "repetition_medians_us": [round(statistics.median(repetition) * 1e6, 2) for repetition in repetitions],
    }


# --- reporting ------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("mini-vllm", "torch", "numpy", "tokenizers", "msgspec")},
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "threads": args.threads,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def print_table(part: str, rows: list[dict[str, Any]]) -> None:
    phases = [name for name in PHASES if any(name in row["phases"] for row in rows)]
    print(f"\n{part}: microseconds a step, median (all requests decoding)")
    print(
        f"{'requests':>9}"
        + "".join(f"{name:>10}" for name in phases)
        + f"{'outside':>10}{'p10':>10}{'p90':>10}{'per req':>9}"
    )
    for row in rows:
        cells = "".join(f"{row['phases'].get(name, {}).get('median_us', 0):>10.1f}" for name in phases)
        outside = row["outside_model"]
        tail = f"{outside['median_us']:>10.1f}{outside['p10_us']:>10.1f}{outside['p90_us']:>10.1f}"
        print(f"{row['num_requests']:>9}{cells}{tail}{row['outside_model_us_per_request']:>9.2f}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=("control", "model", "both"), default="both")
    parser.add_argument("--num-requests", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=32, help="steps a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=8, help="decode steps before the first repetition")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: what the platform chooses")
    parser.add_argument("--model", default=None, help="model folder; default: the bundled model")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file; default: benchmarks/results/step_cost-*.json"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.getLogger("mini_vllm").setLevel(logging.WARNING)
    num_steps = args.warmup + args.steps * args.repetitions + PREFILL_STEPS
    shapes = {"block_size": BLOCK_SIZE, "prompt_len": [PROMPT_LEN, PROMPT_LEN + BLOCK_SIZE - 1], "dtype": args.dtype}
    options = {name: getattr(args, name) for name in ("steps", "repetitions", "warmup", "num_requests", "model")}
    report: dict[str, Any] = {
        "benchmark": "step_cost", **environment(args), "shapes": shapes, "options": options, "parts": {}
    }  # fmt: skip
    builders: dict[str, Callable[[int], Built]] = {
        "control": lambda n: build_control(n, num_steps),
        "model": lambda n: build_model(n, num_steps, args),
    }
    for part in builders if args.part == "both" else [args.part]:
        report["parts"][part] = [measure(builders[part](n), n, args) for n in args.num_requests]
        print_table(part, report["parts"][part])
    if not args.no_save:
        path = args.output or RESULTS / f"step_cost-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()

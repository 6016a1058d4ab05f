"""The real runs of `simulator_fidelity.py` in this process: an engine that is stepped, requests added when due."""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fidelity_requests import Timed
from fidelity_weather import Probe

from mini_vllm.bench.datasets import random_tokens
from mini_vllm.bench.driver import StepNote, core_of, metered
from mini_vllm.bench.metrics import RequestTimeline, request_metrics
from mini_vllm.bench.noise import CpuMeter, NoiseReport
from mini_vllm.bench.throughput import usable_token_ids
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams
from mini_vllm.simulator.options import SimulationOptions

TEMPERATURE = 1.0
SPIN_SECONDS = 0.001
"""Sleeping is this inexact; the rest of a wait is spent looking at the clock."""
WARM_UP_SHARE = 5 / 8
"""Of the context: as long as the longest prompts."""


@dataclass
class Served:
    """One real run. duration: from the first arrival to the last token. probes: times are from the first arrival."""

    timelines: list[RequestTimeline]
    notes: list[StepNote]
    duration: float
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    late_seconds: float
    noise: NoiseReport
    probes: list[tuple[float, float]]

    def metrics(self) -> dict[str, Any]:
        return request_metrics(self.timelines, self.duration) | {
            "num_steps": len(self.notes),
            "busy_seconds": sum(note.seconds for note in self.notes),
            "num_preemptions": self.num_preemptions,
            "prefix_cache_hits": self.prefix_cache_hits,
            "prefix_hit_rate": self.prefix_cache_hits / max(self.prefix_cache_queries, 1),
            "median_late_ms": self.late_seconds * 1e3,
        }


def serve(engine: LLMEngine, requests: Sequence[Timed], clock: Callable[[], float] = time.perf_counter) -> Served:
    """In real time: add what is due, step, until all have ended. Raises `RuntimeError` when one fails."""
    engine.reset_prefix_cache()
    core, waiting, lateness, probe = core_of(engine), list(enumerate(requests))[::-1], [], Probe(clock)
    timelines: dict[str, RequestTimeline] = {}
    with metered(core) as meter:
        before, cpu, begin = core.scheduler.stats(), CpuMeter().start(), clock()
        while waiting or engine.has_unfinished_requests():
            now = clock() - begin
            while waiting and waiting[-1][1].arrival <= now:
                index, timed = waiting.pop()
                timelines[str(index)] = RequestTimeline(str(index), len(timed.prompt), begin + timed.arrival)
                engine.add_request(str(index), {"prompt_token_ids": timed.prompt}, params_of(timed))
                lateness.append(now - timed.arrival)
            probe()
            if engine.has_unfinished_requests():
                step(engine, meter.notes, timelines, clock)
            elif waiting:
                wait_until(begin + waiting[-1][1].arrival, clock)
        noise, after = cpu.stop(), core.scheduler.stats()
    done = list(timelines.values())
    if failed := [timeline.error or timeline.request_id for timeline in done if not timeline.completed]:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return Served(
        done, meter.notes, max(timeline.output_times[-1] for timeline in done) - begin - requests[0].arrival,
        after.num_preemptions - before.num_preemptions, after.prefix_cache_queries - before.prefix_cache_queries,
        after.prefix_cache_hits - before.prefix_cache_hits, float(np.median(lateness)), noise,
        [(when - begin, seconds) for when, seconds in probe.notes],
    )  # fmt: skip


def step(
    engine: LLMEngine, notes: list[StepNote], timelines: dict[str, RequestTimeline], clock: Callable[[], float]
) -> None:
    """One step of the engine, noted as calibration notes it."""
    num_notes, begin = len(notes), clock()
    outputs = engine.step()
    now = clock()
    if len(notes) > num_notes:
        notes[-1].seconds = now - begin
    for output in outputs:
        timeline, completion = timelines[output.request_id], output.outputs[0]
        if completion.token_ids:
            timeline.output_times.append(now)
            timeline.output_counts.append(len(completion.token_ids))
        if output.finished:
            timeline.finish_reason, timeline.error = completion.finish_reason, output.error


def wait_until(when: float, clock: Callable[[], float]) -> None:
    if (left := when - clock() - SPIN_SECONDS) > 0:
        time.sleep(left)
    while clock() < when:
        pass


def params_of(timed: Timed) -> SamplingParams:
    return SamplingParams(
        temperature=TEMPERATURE, max_tokens=timed.output_len, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip


@contextmanager
def engine_of(args: argparse.Namespace, pool: int | None = None) -> Iterator[LLMEngine]:
    """Of the arguments. pool: KV blocks instead of what the engine takes."""
    given = {name: value for name, value in engine_flags(args).items() if value is not None}
    engine = LLMEngine.from_engine_args(EngineArgs(**given, num_gpu_blocks_override=pool, disable_log_stats=True))
    try:
        yield engine
    finally:
        engine.shutdown()


def options_of(engine: LLMEngine) -> SimulationOptions:
    """The simulator's arguments, read off the engine that is there."""
    core = core_of(engine)
    config, cache = core.scheduler.config, core.executor.kv_cache_config()
    return SimulationOptions(
        num_gpu_blocks=cache.num_blocks,
        block_size=core.scheduler.kv.block_size,
        num_kv_groups=len(cache.groups),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_model_len=engine.max_model_len,
        enable_prefix_caching=core.scheduler.kv.enable_caching,
        scheduling_policy=config.policy,
        preemption_policy=config.preemption_policy,
    )


def engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Of the arguments, under the engine's names."""
    return {
        "model": args.model,
        "num_threads": args.threads,
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.max_model_len,
    }


def warm_up(engine: LLMEngine, seconds: float) -> int:
    """Prompts of every length in turn, for as long as that: the first step of a new size costs more than all later.

    Returns the longest that was served.
    """
    token_ids, begin, length = usable_token_ids(engine), time.perf_counter(), 0
    rng = random.Random(0)
    while length < WARM_UP_SHARE * engine.max_model_len and time.perf_counter() - begin < seconds:
        length += 1
        serve(engine, [Timed(0.0, random_tokens(rng, token_ids, length), 2)])
    return length

"""`mini-vllm bench latency`: one batch of equal requests; how long from the first token in to the last token out?"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mini_vllm.bench.datasets import BenchRequest, random_requests, require_fit
from mini_vllm.bench.driver import Driver
from mini_vllm.bench.metrics import percentiles
from mini_vllm.bench.options import LatencyOptions
from mini_vllm.bench.result import build_result, config_of
from mini_vllm.bench.throughput import OnRun, repeat, usable_token_ids
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.exceptions import ConfigError

LATENCY_PERCENTILES = (10, 25, 50, 75, 90, 99)
"""Those of vLLM's latency file."""


def make_batch(options: LatencyOptions, engine: LLMEngine) -> list[BenchRequest]:
    """`batch_size` prompts of random tokens. Raises if they do not fit the context or would not run at once."""
    config = config_of(engine)
    if options.batch_size > config.scheduler.max_num_seqs:
        raise ConfigError(
            f"batch_size: {options.batch_size} is more than may run at once, "
            f"max_num_seqs={config.scheduler.max_num_seqs}"
        )
    batch = random_requests(
        options.batch_size,
        usable_token_ids(engine),
        input_len=options.input_len,
        output_len=options.output_len,
        seed=config.model.seed,
    )
    require_fit(batch, engine.max_model_len, "input_len + output_len")
    return batch


def run_latency(
    engine: LLMEngine,
    options: LatencyOptions,
    engine_arguments: Mapping[str, Any],
    on_run: OnRun = lambda name, run: None,
) -> dict[str, Any]:
    """Warm up, repeat, report: the common figures and vLLM's `avg_latency`, `latencies`, `percentiles` (seconds)."""
    batch = make_batch(options, engine)
    driver = Driver(
        engine,
        temperature=options.temperature,
        detokenize=not options.disable_detokenize,
        keep_prefix_cache=options.keep_prefix_cache,
    )
    repeat(driver, batch, options.num_iters_warmup, "warm-up", on_run)
    runs = repeat(driver, batch, options.num_iters, "iteration", on_run)
    arguments = {"engine": dict(engine_arguments), "benchmark": dataclasses.asdict(options)}
    result = build_result("latency", engine, runs, arguments, detailed=options.save_detailed)
    latencies = [run.duration for run in runs]
    return result | {
        "dataset": {"name": "random", "seed": config_of(engine).model.seed},
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": percentiles(latencies, LATENCY_PERCENTILES),
    }

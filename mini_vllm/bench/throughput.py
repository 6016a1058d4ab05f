"""`mini-vllm bench throughput`: a set of requests, all there from the start; how fast are they served?

`run_throughput` is handed an engine that is ready, makes the requests, warms up, repeats, and returns the report.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mini_vllm.bench.datasets import (
    BenchRequest,
    prefix_repetition_requests,
    random_requests,
    read_sharegpt,
    require_fit,
    sharegpt_requests,
)
from mini_vllm.bench.driver import Driver, Run
from mini_vllm.bench.options import ThroughputOptions
from mini_vllm.bench.result import build_result, config_of
from mini_vllm.engine.llm_engine import LLMEngine

OnRun = Callable[[str, Run], None]
"""Told the name of each run that ended, and the run."""


def usable_token_ids(engine: LLMEngine) -> list[int]:
    """Ids that stand for text: none of the special ones, none above the tokenizer's vocabulary."""
    tokenizer = engine.get_tokenizer()
    special = set(tokenizer.all_special_ids)
    size = min(tokenizer.vocab_size, config_of(engine).model.hf_config.vocab_size)
    return [token_id for token_id in range(size) if token_id not in special] or list(range(size))


def make_requests(options: ThroughputOptions, engine: LLMEngine) -> tuple[list[BenchRequest], dict[str, int]]:
    """(the requests, conversations left out by reason). The seed is the engine's.

    Raises `InvalidParameterError` if they cannot be made or would not fit the context.
    """
    settings, seed = options.dataset_settings(), config_of(engine).model.seed
    if options.dataset == "sharegpt":
        sample = sharegpt_requests(
            read_sharegpt(settings["dataset_path"]),
            options.num_prompts,
            engine.get_tokenizer().encode,
            output_len=settings.get("output_len"),
            max_model_len=engine.max_model_len,
            seed=seed,
        )
        return sample.requests, sample.left_out
    makers: dict[str, Callable[..., list[BenchRequest]]] = {
        "random": random_requests,
        "prefix_repetition": prefix_repetition_requests,
    }
    keywords = {name.removeprefix(f"{options.dataset}_"): value for name, value in settings.items()}
    requests = makers[options.dataset](options.num_prompts, usable_token_ids(engine), seed=seed, **keywords)
    require_fit(requests, engine.max_model_len, " + ".join(name for name in settings if name.endswith("_len")))
    return requests, {}


def run_throughput(
    engine: LLMEngine,
    options: ThroughputOptions,
    engine_arguments: Mapping[str, Any],
    on_run: OnRun = lambda name, run: None,
) -> dict[str, Any]:
    """Warm up, repeat, report. on_run: called after each run with its name ('warm-up', 'repetition 1 of 3')."""
    requests, left_out = make_requests(options, engine)
    driver = Driver(
        engine,
        temperature=options.temperature,
        detokenize=not options.disable_detokenize,
        keep_prefix_cache=options.keep_prefix_cache,
    )
    if options.num_warmups:
        on_run("warm-up", driver.run(requests[: options.num_warmups]))
    runs = repeat(driver, requests, options.num_repeats, "repetition", on_run)
    arguments = {"engine": dict(engine_arguments), "benchmark": dataclasses.asdict(options)}
    result = build_result("throughput", engine, runs, arguments, detailed=options.save_detailed)
    seed = config_of(engine).model.seed
    result["dataset"] = {"name": options.dataset, **options.dataset_settings(), "seed": seed, "left_out": left_out}
    if len(requests) < options.num_prompts:
        result["notes"].append(f"the dataset gave {len(requests)} usable requests of the {options.num_prompts} wanted")
    return result | _vllm_throughput_fields(result)


def repeat(driver: Driver, requests: Sequence[BenchRequest], times: int, name: str, on_run: OnRun) -> list[Run]:
    runs = []
    for index in range(1, times + 1):
        runs.append(driver.run(requests))
        on_run(f"{name} {index} of {times}", runs[-1])
    return runs


def _vllm_throughput_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    """The five fields of vLLM's own throughput file, for tools that read those."""
    return {
        "elapsed_time": result["duration"],
        "num_requests": result["completed"],
        "total_num_tokens": result["total_input_tokens"] + result["total_output_tokens"],
        "requests_per_second": result["request_throughput"],
        "tokens_per_second": result["total_token_throughput"],
    }

"""Whether planning a step beside the one that computes pays: tokens per second with it and without, in alternation.

    python benchmarks/async_scheduling.py llm --threads 1 --requests 1 16 64 256
    python benchmarks/async_scheduling.py async_llm --threads 2
    python benchmarks/async_scheduling.py server --threads 1
    python benchmarks/async_scheduling.py large --threads 2 --requests 32 --output-len 12

`llm` and `large` step an `LLM` in this process, `async_llm` reads streams from an engine process, `server` sends HTTP
requests to two servers. Both engines are there from the start; runs alternate between them and change who is first, so
that a machine that becomes slower hits both. `large` has the shape of a model of half a billion parameters and random
weights, quantised. Prints a line for each number of requests and writes one JSON file with every run.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mini_vllm.bench.environment import collect_environment
from mini_vllm.engine.arg_utils import DEFAULT_MODEL, EngineArgs
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

RESULTS = Path(__file__).resolve().parent / "results"
PROMPT_LEN = 16
MODES = (False, True)
LARGE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

Measure = Callable[[bool, int], float]
"""(asynchronous?, number of requests) -> seconds that one run took."""


def params_of(output_len: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=output_len, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )


def prompts_of(count: int, run: int) -> list[dict[str, Any]]:
    """Prompts that no other run had, so that no prefix is cached."""
    return [
        {"prompt_token_ids": [3 + (7 * number + 31 * run + 13 * at) % 1500 for at in range(PROMPT_LEN)]}
        for number in range(count)
    ]


# --- the ways in ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def through_llm(arguments: dict[str, Any], output_len: int) -> Iterator[Measure]:
    from mini_vllm.entrypoints.llm import LLM

    engines = {mode: LLM(async_scheduling=mode, disable_log_stats=True, **arguments) for mode in MODES}
    runs = iter(range(10**6))

    def measure(mode: bool, count: int) -> float:
        prompts = prompts_of(count, next(runs))
        start = time.perf_counter()
        engines[mode].generate(prompts, params_of(output_len), use_tqdm=False)
        return time.perf_counter() - start

    yield measure


@contextlib.contextmanager
def through_async_llm(arguments: dict[str, Any], output_len: int) -> Iterator[Measure]:
    from mini_vllm.engine.async_llm import AsyncLLM

    with asyncio.Runner() as runner:

        async def start(mode: bool) -> AsyncLLM:
            return await AsyncLLM.from_engine_args(EngineArgs(async_scheduling=mode, **arguments))

        engines = {mode: runner.run(start(mode)) for mode in MODES}
        runs = iter(range(10**6))
        streamed = SamplingParams(
            temperature=0.0, max_tokens=output_len, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )

        async def one(engine: AsyncLLM, prompt: Any, name: str) -> None:
            async for _ in engine.generate(prompt, streamed, name):
                pass

        async def all_of(mode: bool, count: int) -> float:
            run = next(runs)
            prompts = prompts_of(count, run)
            begin = time.perf_counter()
            await asyncio.gather(*(one(engines[mode], p, f"{run}-{n}") for n, p in enumerate(prompts)))
            return time.perf_counter() - begin

        try:
            yield lambda mode, count: runner.run(all_of(mode, count))
        finally:
            for engine in engines.values():
                engine.shutdown()


@contextlib.contextmanager
def through_server(arguments: dict[str, Any], output_len: int) -> Iterator[Measure]:
    from mini_vllm.bench.serve.benchmark import run_serve
    from mini_vllm.bench.serve.options import ServeOptions

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from serving_process import model_server  # type: ignore[import-not-found]

    flags = [word for name, value in arguments.items() for word in ("--" + name.replace("_", "-"), str(value))]
    runs = iter(range(10**6))
    with contextlib.ExitStack() as stack:
        servers = {
            mode: stack.enter_context(model_server(*flags, f"--{'' if mode else 'no-'}async-scheduling"))
            for mode in MODES
        }

        def measure(mode: bool, count: int) -> float:
            options = ServeOptions(
                port=servers[mode].port, num_prompts=count, seed=next(runs), random_input_len=PROMPT_LEN,
                random_output_len=output_len, ignore_eos=True, temperature=0.0,
            )  # fmt: skip
            result, _ = run_serve(options)
            assert result["completed"] == count, result.get("errors")
            return float(result["duration"])

        yield measure


WAYS = {"llm": through_llm, "large": through_llm, "async_llm": through_async_llm, "server": through_server}


# --- runs and what they say -----------------------------------------------------------------------------------


def alternate(measure: Measure, counts: Sequence[int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Both modes by turns, each first as often as second."""
    rows = []
    for count in counts:
        for mode in MODES:
            measure(mode, count)
        rates: dict[bool, list[float]] = {mode: [] for mode in MODES}
        for number in range(repeats):
            for mode in MODES if number % 2 == 0 else reversed(MODES):
                rates[mode].append(count * tokens / measure(mode, count))
        rows.append({"num_requests": count, "sync_tokens_per_s": rates[False], "async_tokens_per_s": rates[True]})
        print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    off, on = row["sync_tokens_per_s"], row["async_tokens_per_s"]
    ratios = [b / a for a, b in zip(off, on, strict=True)]
    return (
        f"{row['num_requests']:4} requests: {statistics.median(off):7.0f} off, {statistics.median(on):7.0f} on tok/s;"
        f" on/off {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def arguments_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_threads": options.threads}
    if options.way == "large":
        (folder / "config.json").write_text(json.dumps(LARGE))
        arguments |= {
            "model": str(folder), "tokenizer": str(DEFAULT_MODEL), "load_format": "dummy", "quantization": "int8",
            "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28,
        }  # fmt: skip
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=sorted(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        WAYS[options.way](arguments_of(options, Path(folder)), options.output_len) as measure,
    ):
        rows = alternate(measure, options.requests, options.output_len, options.repeats)
    result = {"benchmark": "async_scheduling", "options": vars(options), "prompt_len": PROMPT_LEN, "rows": rows}
    path = RESULTS / f"async_scheduling_{options.way}_{options.threads}t.json"
    path.write_text(json.dumps(result | {"environment": collect_environment()}, indent=1, default=str) + "\n")
    print(path)


if __name__ == "__main__":
    main()

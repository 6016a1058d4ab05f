"""A server against the same engine without one, and our load generator against one that is not ours.

The model has the shape of Qwen2.5-0.5B, with random weights and a made-up tokenizer in which every one of its ids has
text, as with a real model. One set of requests (token ids, drawn anew for each repetition so that the prefix cache is
cold) goes in turn through

    process   `AsyncLLM` as the server uses it: the core in a process of its own, no HTTP
    thread    `AsyncLLM` with the core in a thread of the caller
    serve     `mini-vllm serve`, driven by `mini-vllm bench serve`

and the ratio of serve to process is what the API costs. Each has its own engine for the whole time; those that have
nothing to do sleep.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from serving_process import ROOT, Server, model_server
from serving_report import spread_of
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from mini_vllm.bench.metrics import RequestTimeline, request_metrics
from mini_vllm.bench.serve.datasets import RequestMaker, ServeRequest
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.engine.arg_utils import EngineArgs
from mini_vllm.engine.async_llm import AsyncLLM
from mini_vllm.sampling_params import RequestOutputKind, SamplingParams

QWEN_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 151935,
}  # fmt: skip
END = "<|endoftext|>"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
FIGURES = ("output_throughput", "p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms", "p50_tpot_ms")


@dataclass(frozen=True)
class Work:
    """The set of requests. quick: a model of two small layers instead."""

    num_requests: int = 96
    concurrency: int = 32
    prompt_len: int = 160
    output_len: int = 96
    repetitions: int = 3
    quick: bool = False

    @classmethod
    def small(cls) -> "Work":
        return cls(6, 3, 12, 8, 1, quick=True)

    @property
    def shape(self) -> dict[str, Any]:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "vocab_size": 2048, "eos_token_id": 2047, "num_key_value_heads": 2}  # fmt: skip
        return QWEN_05B | (small if self.quick else {})

    def options(self, repetition: int, **more: Any) -> ServeOptions:
        """Those of `bench serve`, which make the same requests on both sides."""
        return ServeOptions(
            num_prompts=self.num_requests, seed=repetition, random_input_len=self.prompt_len,
            random_output_len=self.output_len, prompt_token_ids=True, max_concurrency=self.concurrency,
            ignore_eos=True, temperature=0.0, num_warmups=min(self.concurrency, 4), metric_percentiles="50,99", **more,
        )  # fmt: skip


def make_folder(path: Path, work: Work) -> None:
    """A configuration and a tokenizer whose every id has text, for `--load-format dummy` and for any client."""
    size = work.shape["vocab_size"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate(alphabet)}
    vocab |= {f"Ġw{i}": i for i in range(len(vocab), size - 1)}
    tokenizer = RustTokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path / "tokenizer.json"))
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(known), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(work.shape), encoding="utf-8")


def engine_options(folder: str, work: Work) -> dict[str, Any]:
    """The same for every engine."""
    tokens = work.concurrency * (work.prompt_len + work.output_len + 32)
    return {"model": folder, "load_format": "dummy", "max_num_seqs": work.concurrency,
            "max_model_len": 4 * (work.prompt_len + work.output_len), "num_gpu_blocks_override": tokens // 16 * 2,
            "disable_log_stats": True}  # fmt: skip


def flags_of(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


# --- without a server -----------------------------------------------------------------------------------------


async def run_engine(engine: AsyncLLM, requests: Sequence[ServeRequest], concurrency: int) -> dict[str, Any]:
    """Figures of one set, as a client of the engine sees them."""
    limit, timelines = asyncio.Semaphore(concurrency), []

    async def one(index: int, request: ServeRequest) -> None:
        params = SamplingParams(
            max_tokens=request.output_len, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        async with limit:
            timeline = RequestTimeline(f"r{index}", request.prompt_len, time.perf_counter())
            prompt = {"prompt_token_ids": request.prompt}
            async for output in engine.generate(prompt, params, f"r{index}-{time.monotonic_ns()}"):
                timeline.output_times.append(time.perf_counter())
                timeline.output_counts.append(len(output.outputs[0].token_ids))
                timeline.finish_reason = output.outputs[0].finish_reason
            timelines.append(timeline)

    start = time.perf_counter()
    await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))
    return request_metrics(timelines, time.perf_counter() - start)


class EngineSide:
    """An `AsyncLLM` and its event loop."""

    def __init__(self, folder: str, work: Work, in_process: bool) -> None:
        self.work = work
        self.runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        args = EngineArgs.from_kwargs(**engine_options(folder, work))
        self.engine = self.runner.run(AsyncLLM.from_engine_args(args, in_process=in_process))

    def run(self, repetition: int) -> dict[str, Any]:
        maker = RequestMaker(self.work.options(repetition), self.engine.get_tokenizer())
        requests, _ = maker.requests()
        warm_up = run_engine(self.engine, maker.warmups(requests), self.work.concurrency)
        self.runner.run(warm_up)
        return self.runner.run(run_engine(self.engine, requests, self.work.concurrency))

    def close(self) -> None:
        self.runner.run(self._shutdown())
        self.runner.close()

    async def _shutdown(self) -> None:
        self.engine.shutdown()


# --- with a server --------------------------------------------------------------------------------------------


def run_bench_serve(server: Server, work: Work, repetition: int, *, text: bool = False) -> dict[str, Any]:
    """One run of `mini-vllm bench serve` in a process of its own. text: send the prompts as text."""
    o = work.options(repetition)
    command = [
        sys.executable, "-m", "mini_vllm", "bench", "serve", "--base-url", server.url, "--num-prompts", o.num_prompts,
        "--seed", repetition + (1000 if text else 0), "--random-input-len", work.prompt_len,
        "--random-output-len", work.output_len, "--max-concurrency", work.concurrency, "--ignore-eos",
        "--temperature", 0, "--num-warmups", o.num_warmups, "--metric-percentiles", "50,99",
        *([] if text else ["--prompt-token-ids"]),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        done = subprocess.run(
            [str(part) for part in command] + ["--save-result", "--result-filename", str(path)],
            capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"bench serve failed:\n{(done.stdout + done.stderr)[-2000:]}")
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


@contextmanager
def shaped_server(work: Work, folder: str) -> Iterator[Server]:
    with model_server(*flags_of(engine_options(folder, work)), "--served-model-name", "shape") as server:
        yield server


# --- the comparison -------------------------------------------------------------------------------------------


def compare(work: Work) -> dict[str, Any]:
    """All three in turn; medians and spread of each, and of the ratios of serve to the others by repetition."""
    runs: dict[str, list[dict[str, Any]]] = {"process": [], "thread": [], "serve": []}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        make_folder(Path(folder), work)
        sides = {"process": EngineSide(folder, work, False), "thread": EngineSide(folder, work, True)}
        for side in sides.values():
            stack.callback(side.close)
        server = stack.enter_context(shaped_server(work, folder))
        for repetition in range(work.repetitions):
            for name, side in sides.items():
                runs[name].append(side.run(repetition))
            runs["serve"].append(run_bench_serve(server, work, repetition))
    if any(run["failed"] for each in runs.values() for run in each):
        raise RuntimeError("a request failed")
    return {"sides": {name: figures(each) for name, each in runs.items()}, "ratios": ratios(runs)}


def figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: spread_of([run[name] for run in runs]) for name in FIGURES if name in runs[0]}


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """serve / process and serve / thread, repetition by repetition: what drifts with time falls out."""
    return {
        f"serve/{other}": {
            name: spread_of([a[name] / b[name] for a, b in zip(runs["serve"], runs[other], strict=True)])
            for name in FIGURES
            if name in runs["serve"][0] and runs[other][0].get(name)
        }
        for other in runs
        if other != "serve"
    }


# --- a client that is not ours --------------------------------------------------------------------------------


def run_guidellm(guidellm: str, server: Server, work: Work, folder: str, repetition: int) -> dict[str, Any]:
    """One run of guidellm with the same load; its figures under the names of ours."""
    path = Path(folder) / f"guidellm-{repetition}.json"
    command = [
        guidellm, "run", "--backend", f"kind=openai_http,target={server.url},model=shape",
        "--profile", f"kind=concurrent,streams={work.concurrency}",
        "--constraint", f"kind=max_requests,count={work.num_requests}", "--tokenizer", f"kind=hf_auto,model={folder}",
        "--data", f"kind=synthetic_text,prompt_tokens={work.prompt_len},output_tokens={work.output_len}",
        "--seed", f"kind=static,value={repetition + 1}", "--output", f"kind=json,path={path}", "--disable-console",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=_offline())
    if done.returncode != 0 or not path.exists():
        raise RuntimeError(f"guidellm failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return guidellm_figures(json.loads(path.read_text(encoding="utf-8")))


def _offline() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def guidellm_figures(report: dict[str, Any]) -> dict[str, Any]:
    """What its report says of the requests that succeeded."""
    metrics = report["benchmarks"][0]["metrics"]

    def percentile(name: str, rank: str) -> float:
        return float(metrics[name]["successful"]["percentiles"][rank])

    return {
        "output_throughput": float(metrics["output_tokens_per_second"]["successful"]["mean"]),
        "p50_ttft_ms": percentile("time_to_first_token_ms", "p50"),
        "p99_ttft_ms": percentile("time_to_first_token_ms", "p99"),
        "p50_itl_ms": percentile("inter_token_latency_ms", "p50"),
        "p99_itl_ms": percentile("inter_token_latency_ms", "p99"),
        "completed": int(metrics["request_totals"]["successful"]),
    }


def compare_clients(work: Work, guidellm: str) -> dict[str, Any]:
    """Both clients in turn against one server, prompts as text."""
    runs: dict[str, list[dict[str, Any]]] = {"bench serve": [], "guidellm": []}
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), work)
        with shaped_server(work, folder) as server:
            for repetition in range(work.repetitions):
                runs["bench serve"].append(run_bench_serve(server, work, repetition, text=True))
                runs["guidellm"].append(run_guidellm(guidellm, server, work, folder, repetition))
    version = subprocess.run([guidellm, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return {"client": version, "sides": {name: figures(each) for name, each in runs.items()}}

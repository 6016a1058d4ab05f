"""What it costs to choose one token for each of many rows, beside plain torch, and as a share of a decode step.

Rows are as unlike each other as a case allows (temperature, k, p, seeds, penalties differ from row to row). They go
through what the worker runs, `SamplingStage` over an `InputBatch`, so that histories, masks and random streams are part
of what is timed. Logits are given: 'peaked' falls off like a language model's (Zipf's law, rounded to bfloat16, so with
ties), 'flat' is the worst case (normal, so that top-p keeps tens of thousands of tokens).

The decode step is one forward and the logits of a model in the shape of Qwen2.5-0.5B, bf16, dummy weights, every row
with `--context` tokens. Cases and the plain versions are timed in turn (A B C A B C), so that what else the machine
does falls on all alike. Prints a table and writes one JSON file.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_cost import RESULTS, environment

from mini_vllm.config import CacheConfig, DeviceConfig, EngineConfig, LoadConfig, ModelConfig, SchedulerConfig
from mini_vllm.core.interfaces import KVCacheConfig
from mini_vllm.core.scheduler_output import NewRequestData, SchedulerOutput
from mini_vllm.hf_config import HFConfig
from mini_vllm.platforms import select_platform
from mini_vllm.sampling.sampler import Sampler
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.worker.input_batch import InputBatch
from mini_vllm.worker.model_runner import ModelRunner
from mini_vllm.worker.prepare_inputs import StepInputs
from mini_vllm.worker.sampling_stage import SamplingStage

QWEN_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
BLOCK_SIZE = 16
Case = Callable[[int, int], SamplingParams]


def temperature(row: int) -> float:
    return 0.5 + 0.1 * (row % 6)


def everything(row: int, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=temperature(row), top_k=20 + row % 60, top_p=0.85 + 0.01 * (row % 10), min_p=0.001 * (row % 5),
        repetition_penalty=1.05 + 0.01 * (row % 5), presence_penalty=0.1, frequency_penalty=0.1,
        logit_bias={(row * 7 + i) % vocab: 1.0 for i in range(8)}, min_tokens=10**6, max_tokens=None, seed=row,
    )  # fmt: skip


CASES: dict[str, Case] = {
    "greedy": lambda row, vocab: SamplingParams(temperature=0.0),
    "temperature": lambda row, vocab: SamplingParams(temperature=temperature(row), seed=row),
    "top_k 50": lambda row, vocab: SamplingParams(temperature=temperature(row), top_k=50, seed=row),
    "top_p 0.9": lambda row, vocab: SamplingParams(temperature=temperature(row), top_p=0.9, seed=row),
    "min_p 0.05": lambda row, vocab: SamplingParams(temperature=temperature(row), min_p=0.05, seed=row),
    "penalties": lambda row, vocab: SamplingParams(temperature=0.0, repetition_penalty=1.1, frequency_penalty=0.2),
    "everything on": everything,
    "one of each": lambda row, vocab: list(CASES.values())[row % 7](row, vocab),
    "greedy, 5 logprobs": lambda row, vocab: SamplingParams(temperature=0.0, logprobs=5),
}


# --- ours ---------------------------------------------------------------------------------------------------


class Stage:
    """A batch of rows that all decode, each with `history` tokens of which half are output."""

    def __init__(self, case: Case, rows: int, vocab: int, history: int) -> None:
        self.batch = InputBatch(rows, history + 4096, [BLOCK_SIZE], select_platform("cpu"))
        self.stage = SamplingStage(self.batch, vocab, [], np.random.default_rng(0))
        rng = np.random.default_rng(1)
        for row in range(rows):
            tokens = (rng.zipf(1.3, history) % vocab).tolist()
            self.stage.add(
                NewRequestData(
                    str(row), tokens, history // 2, case(row, vocab), ([],), history - 1,
                    all_stop_token_ids=[2], bad_words_token_ids=[[5], [6, 7]] if case is everything else [],
                )
            )  # fmt: skip
        self.inputs = StepInputs(
            req_ids=list(self.batch.req_ids), rows=slice(0, rows), input_ids=torch.empty(0), positions=torch.empty(0),
            attention=[], num_samples=rows, num_logits=np.ones(rows, dtype=np.int64), logits_indices=None,
            sampling_rows=slice(0, rows),
        )  # fmt: skip

    def __call__(self, logits: torch.Tensor) -> None:
        self.stage.sample(self.inputs, logits, SAMPLER, {})


SAMPLER = Sampler()


# --- plain torch --------------------------------------------------------------------------------------------


def naive_argmax(logits: torch.Tensor) -> None:
    logits.argmax(dim=1)


def naive_multinomial(logits: torch.Tensor) -> None:
    torch.multinomial(torch.softmax(logits / 0.8, dim=1), 1)


def naive_top_k(logits: torch.Tensor) -> None:
    values, ids = logits.topk(50, dim=1)
    ids.gather(1, torch.multinomial(torch.softmax(values / 0.8, dim=1), 1))


def naive_full_sort(logits: torch.Tensor) -> None:
    """Top-k and top-p as engines do it without a kernel: sort, running sum, mask, scatter back."""
    values, ids = (logits / 0.8).sort(dim=1)
    below = torch.softmax(values, dim=1).cumsum(dim=1) <= 1 - 0.9
    below[:, -1] = False
    masked = torch.full_like(logits, -torch.inf).scatter_(1, ids, values.masked_fill(below, -torch.inf))
    torch.multinomial(torch.softmax(masked, dim=1), 1)


NAIVE: dict[str, Callable[[torch.Tensor], None]] = {
    "argmax": naive_argmax,
    "softmax + multinomial": naive_multinomial,
    "topk 50 + multinomial": naive_top_k,
    "full sort top_p 0.9": naive_full_sort,
}


# --- the decode step it is a share of ------------------------------------------------------------------------


class DecodeStep:
    """Forward and logits of `rows` requests with `context` tokens each, whose keys and values are zeros."""

    def __init__(self, rows: int, context: int, threads: int | None, layers: int) -> None:
        hf_config = HFConfig.from_dict(QWEN_05B | {"num_hidden_layers": layers})
        config = EngineConfig(
            ModelConfig(tempfile.gettempdir(), hf_config, "bfloat16", None),
            cache=CacheConfig(block_size=BLOCK_SIZE),
            scheduler=SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=max(rows, 64)),
            load=LoadConfig(load_format="dummy", use_tqdm=False),
            device=DeviceConfig(device="cpu", num_threads=threads),
        )
        self.runner = ModelRunner(config)
        self.runner.load_model()
        blocks = -(-(context + 1) // BLOCK_SIZE)
        groups = self.runner.get_kv_cache_groups()
        self.runner.initialize_kv_cache(KVCacheConfig(1 + rows * blocks, groups), context + BLOCK_SIZE)
        self.plan = SchedulerOutput(total_num_scheduled_tokens=rows)
        for row in range(rows):
            table = list(range(1 + row * blocks, 1 + (row + 1) * blocks))
            tokens = [(row + i) % 1000 for i in range(context)]
            params = SamplingParams(temperature=0.0)
            self.plan.new_reqs.append(NewRequestData(str(row), tokens, context, params, (table,), context - 1))
            self.plan.num_scheduled_tokens[str(row)] = 1
        self.again = SchedulerOutput(num_scheduled_tokens=self.plan.num_scheduled_tokens)
        self.again.total_num_scheduled_tokens = rows
        self.runner.execute_model(self.plan)

    def __call__(self) -> None:
        self.runner.execute_model(self.again)  # no token is kept, so it is the same step again


# --- timing -------------------------------------------------------------------------------------------------


def make_logits(kind: str, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, vocab, generator=generator)
    if kind == "flat":
        return noise
    ranks = torch.arange(1, vocab + 1).float()
    order = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)])
    return (-1.6 * torch.log(ranks)[order] + 0.5 * noise).bfloat16().float()


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def spread(values: list[float]) -> dict[str, float]:
    ranked = sorted(values)
    return {
        "median_ms": statistics.median(ranked),
        "p10_ms": ranked[len(ranked) // 10],
        "p90_ms": ranked[-1 - len(ranked) // 10],
        "min_ms": ranked[0],
        "n": len(ranked),
    }


@torch.inference_mode()
def measure(kind: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every case and every plain version, in turn."""
    logits = make_logits(kind, args.rows, args.vocab)
    scratch = logits.clone()
    runs: dict[str, Callable[[torch.Tensor], None]] = {
        name: Stage(case, args.rows, args.vocab, args.history) for name, case in CASES.items()
    }
    runs |= {f"torch: {name}": run for name, run in NAIVE.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(args.warmup + args.repetitions):
        for name, run in runs.items():
            scratch.copy_(logits)  # masks and penalties change them in place, as they may in the worker
            elapsed = timed(lambda run=run: run(scratch))  # type: ignore[misc]
            if repetition >= args.warmup:
                times[name].append(elapsed)
    return {name: spread(values) for name, values in times.items()}


def measure_decode(args: argparse.Namespace) -> dict[str, float]:
    step = DecodeStep(args.rows, args.context, args.threads, args.layers)
    for _ in range(args.warmup):
        step()
    return spread([timed(step) for _ in range(args.repetitions)])


def print_table(kind: str, found: dict[str, dict[str, float]], decode: float | None) -> None:
    print(f"\n{kind}: ms a step" + (f" (one decode step: {decode:.1f} ms)" if decode else ""))
    print(f"{'':>28}{'median':>10}{'p10':>10}{'p90':>10}{'share':>9}")
    for name, row in found.items():
        share = f"{100 * row['median_ms'] / decode:>8.1f}%" if decode else ""
        print(f"{name:>28}{row['median_ms']:>10.2f}{row['p10_ms']:>10.2f}{row['p90_ms']:>10.2f}{share}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--history", type=int, default=512, help="tokens a row has, half of them output")
    parser.add_argument("--context", type=int, default=512, help="tokens a row attends to in the decode step")
    parser.add_argument("--layers", type=int, default=24, help="layers of the decode step's model")
    parser.add_argument("--kinds", nargs="+", choices=("peaked", "flat"), default=["peaked", "flat"])
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None, help="torch threads; default: what the platform chooses")
    parser.add_argument("--no-decode", action="store_true", help="leave out the decode step")
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file; default: benchmarks/results/sampling-*.json"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    logging.getLogger("mini_vllm").setLevel(logging.WARNING)
    args.threads = select_platform("cpu").set_num_threads(args.threads)
    options = {name: value for name, value in vars(args).items() if name not in ("output", "no_save")}
    report: dict[str, Any] = {"benchmark": "sampling", **environment(args), "options": options}
    decode = None
    if not args.no_decode:
        report["decode_step"] = measure_decode(args)
        decode = report["decode_step"]["median_ms"]
    report["sampling"] = {kind: measure(kind, args) for kind in args.kinds}
    for kind, found in report["sampling"].items():
        for row in found.values() if decode else ():
            row["share_of_decode_step"] = row["median_ms"] / decode
        print_table(kind, found, decode)
    if not args.no_save:
        path = args.output or RESULTS / f"sampling-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()

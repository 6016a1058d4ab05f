"""`mini-vllm bench latency` and `mini-vllm bench throughput`: measure the engine, print tables, write JSON.

`mini-vllm bench serve` is in `bench_serve.py`.
"""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from mini_vllm.bench.options import DATASET_DEFAULTS, DATASETS, LatencyOptions, ThroughputOptions
from mini_vllm.entrypoints.cli import bench_serve
from mini_vllm.entrypoints.cli.arguments import HelpFormatter, add_engine_arguments, engine_args_from

if TYPE_CHECKING:
    from collections.abc import Callable

    from mini_vllm.bench.driver import Run

Options = LatencyOptions | ThroughputOptions

_LATENCY_EXAMPLES = """\
examples:
  mini-vllm bench latency
  mini-vllm bench latency --model DIR --input-len 512 --output-len 1        prefill alone
  mini-vllm bench latency --model DIR --batch-size 1 --output-json one.json
"""
_THROUGHPUT_EXAMPLES = """\
examples:
  mini-vllm bench throughput
  mini-vllm bench throughput --model DIR --num-prompts 64 --output-json result.json
  mini-vllm bench throughput --model DIR --dataset-path ShareGPT.json --num-prompts 200
  mini-vllm bench throughput --dataset-name prefix_repetition --prefix-repetition-num-prefixes 4
"""
_LATENCY_HELP = {
    "input_len": "Tokens in each prompt.",
    "output_len": "Tokens to generate for each; the end of sequence is ignored.",
    "batch_size": "Requests in the batch.",
    "num_iters": "Times the batch is measured.",
    "num_iters_warmup": "Times it runs before that.",
}
_THROUGHPUT_HELP = {
    "num_prompts": "Requests in the set.",
    "dataset_path": 'A ShareGPT-shaped JSON file: a list of {"conversations": [{"from", "value"}, ...]}.',
    "input_len": "The same as --random-input-len.",
    "output_len": "Tokens to generate for each, in place of the dataset's own length.",
    "random_input_len": "Tokens in each prompt, on average.",
    "random_output_len": "Tokens to generate, on average.",
    "random_range_ratio": "Lengths are uniform within this share of the average, in [0, 1).",
    "random_prefix_len": "Tokens that all prompts begin with, on top of the input length.",
    "prefix_repetition_prefix_len": "Tokens in each prefix.",
    "prefix_repetition_suffix_len": "Tokens after the prefix, different in each prompt.",
    "prefix_repetition_num_prefixes": "Different prefixes.",
    "prefix_repetition_output_len": "Tokens to generate for each.",
    "num_repeats": "Times the set is measured.",
    "num_warmups": "Requests of the set that run once before that.",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure latency or throughput, of the engine or of a server",
        description="Measure the engine on this machine, or a server under load.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    kinds = parser.add_subparsers(title="benchmarks", dest="benchmark", metavar="BENCHMARK", required=True)
    latency = _add_kind(
        kinds, "latency", "one batch of equal requests", _LATENCY_EXAMPLES,
        "Measure the latency of a single batch of requests, all sent at once.",
    )  # fmt: skip
    _add_latency_flags(latency)
    throughput = _add_kind(
        kinds, "throughput", "a set of requests, all there from the start", _THROUGHPUT_EXAMPLES,
        "Measure how fast a set of requests is served. --seed decides the random prompts, too.",
    )  # fmt: skip
    _add_throughput_flags(throughput)
    bench_serve.add_parser(kinds)


def _add_kind(kinds: Any, name: str, summary: str, examples: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_latency_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    for name, text in _LATENCY_HELP.items():
        _add_number(group, name, int, text, getattr(LatencyOptions, name))
    _add_common_flags(group)
    add_engine_arguments(parser)


def _add_throughput_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--dataset-name", choices=DATASETS, default=argparse.SUPPRESS,
        help="Where requests come from. Default: sharegpt with --dataset-path, else random.",
    )  # fmt: skip
    own_defaults = {name: value for flags in DATASET_DEFAULTS.values() for name, value in flags.items()}
    for name, text in _THROUGHPUT_HELP.items():
        kind = {"dataset_path": str, "random_range_ratio": float}.get(name, int)
        _add_number(group, name, kind, text, own_defaults.get(name, getattr(ThroughputOptions, name)))
    _add_common_flags(group)
    add_engine_arguments(parser)


def _add_number(group: Any, name: str, kind: "Callable[[str], Any]", text: str, default: Any) -> None:
    """A flag that stays out of the namespace when it is not given: defaults live in the options."""
    shown = "" if default is None else f" Default: {default}."
    metavar = {int: "N", float: "X", str: "FILE"}[kind]  # type: ignore[index]
    group.add_argument(_flag(name), dest=name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text + shown)


def _add_common_flags(group: Any) -> None:
    _add_number(group, "temperature", float, "Of every request; 0 is greedy.", LatencyOptions.temperature)
    for name, text in (
        ("disable_detokenize", "Do not turn tokens into text."),
        ("keep_prefix_cache", "Do not empty the prefix cache between repetitions: all but the first are warm."),
        ("save_detailed", "Keep every inter-token latency in the JSON."),
    ):
        group.add_argument(_flag(name), dest=name, action="store_true", default=argparse.SUPPRESS, help=text)
    group.add_argument("--output-json", metavar="FILE", help="Write the report, raw values included, to this file.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def options_from(namespace: argparse.Namespace, kind: type[Options]) -> Options:
    """The benchmark's options that were given. Raises `ConfigError`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(namespace).items() if name in names})


def run(args: argparse.Namespace) -> int:
    """Status 1 when requests failed: their figures are not those of the set that was asked for."""
    from mini_vllm.bench.result import require_writable, write_json

    engine_args = engine_args_from(args)
    options = options_from(args, LatencyOptions if args.benchmark == "latency" else ThroughputOptions)
    target = require_writable(args.output_json) if args.output_json else None
    result = _measure(options, engine_args)
    _print(result)
    if target is not None:
        write_json(target, result)
        print(f"written to {target}")
    return 1 if result["failed"] else 0


def _measure(options: Options, engine_args: Any) -> dict[str, Any]:
    from mini_vllm.bench.latency import run_latency
    from mini_vllm.bench.throughput import run_throughput
    from mini_vllm.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(engine_args)
    try:
        arguments = dataclasses.asdict(engine_args)
        if isinstance(options, LatencyOptions):
            return run_latency(engine, options, arguments, _progress)
        return run_throughput(engine, options, arguments, _progress)
    finally:
        engine.shutdown()


def _progress(name: str, run: "Run") -> None:
    tokens = sum(timeline.num_output_tokens for timeline in run.timelines)
    rate = tokens / run.duration if run.duration else 0.0
    print(f"{name}: {run.duration:.3f} s, {rate:.1f} output tokens/s", file=sys.stderr)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    from mini_vllm.bench.report import render

    # a pipe has no width of its own, and wrapped tables are hard to read in logs
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(render(result))

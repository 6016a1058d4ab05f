"""`mini-vllm bench serve`: put a load on a server, print vLLM's report, write its JSON."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini_vllm.bench.serve.options import DATASET_DEFAULTS, ENDPOINTS, ServeOptions
from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.exceptions import ConfigError

_EXAMPLES = """\
examples (a server is there: mini-vllm serve):
  mini-vllm bench serve --num-prompts 64 --random-input-len 256 --random-output-len 64 --ignore-eos
  mini-vllm bench serve --request-rate 4 --num-prompts 200 --goodput ttft:500 tpot:50
  mini-vllm bench serve --request-rate 4 --burstiness 0.3 --max-concurrency 32       in bursts, at most 32 at once
  mini-vllm bench serve --backend openai-chat --dataset-name sharegpt --dataset-path ShareGPT.json
  mini-vllm bench serve --dataset-name timed_trace --dataset-path trace.jsonl        as requests really came
  mini-vllm bench serve --base-url http://10.0.0.5:8000 --tokenizer DIR --save-result --save-detailed
"""
_JSON = "JSON object"
NOT_HERE = {
    "no_oversample": "prompts are never repeated to fill up a set; leave the flag out",
    **dict.fromkeys(
        """profile use_beam_search lora_modules lora_assignment skip_tokenizer_init plot_timeline plot_dataset_stats
        timeline_itl_thresholds hf_name hf_split hf_subset hf_output_len random_batch_size
        custom_skip_chat_template skip_chat_template spec_bench_output_len spec_bench_category""".split(),
        "vLLM has this flag, but it is not supported here yet",
    ),
}
"""Flags of `vllm bench serve` that are none of ours, and why."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    """kind: from text to value, bool for a switch. many: takes several values."""

    kind: Callable[[str], Any]
    metavar: str
    help: str
    many: bool = False


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_json_object.__name__ = _JSON  # what argparse calls a value that does not parse

_SECTIONS: dict[str, dict[str, _Flag]] = {
    "server": {
        "backend": _Flag(str, "NAME", f"The API: {', '.join(ENDPOINTS)}."),
        "base_url": _Flag(str, "URL", "Where the server is, in place of --host and --port."),
        "host": _Flag(str, "HOST", "Its address."),
        "port": _Flag(int, "N", "Its port."),
        "endpoint": _Flag(str, "PATH", "Path of the requests. Default: the backend's own."),
        "header": _Flag(str, "NAME=VALUE", "Headers of every request. The key of $OPENAI_API_KEY is sent.", many=True),
        "insecure": _Flag(bool, "", "Take any TLS certificate."),
        "model": _Flag(str, "NAME", "The model. Default: the first that /v1/models lists."),
        "served_model_name": _Flag(str, "NAME", "What requests call it, if that is not --model."),
        "tokenizer": _Flag(str, "DIR", "Folder or hub name. Default: the model's, where its files are here too."),
        "ready_check_timeout_sec": _Flag(float, "S", "Wait this long for a server that is not up yet."),
    },
    "requests": {
        "dataset_name": _Flag(str, "NAME", f"Where prompts come from: {', '.join(DATASET_DEFAULTS)}."),
        "dataset_path": _Flag(str, "FILE", "For sharegpt (JSON), custom and timed_trace (JSON lines)."),
        "num_prompts": _Flag(int, "N", "Requests to send."),
        "seed": _Flag(int, "N", "Decides prompts and arrivals."),
        "input_len": _Flag(int, "N", "The same as --random-input-len."),
        "output_len": _Flag(int, "N", "Tokens to generate, in place of the dataset's own flag."),
        "random_input_len": _Flag(int, "N", "Tokens in each prompt, on average."),
        "random_output_len": _Flag(int, "N", "Tokens to generate, on average."),
        "random_range_ratio": _Flag(float, "X", "Lengths are uniform within this share of the average, in [0, 1)."),
        "random_prefix_len": _Flag(int, "N", "Tokens that all prompts begin with, on top of the input length."),
        "prefix_repetition_prefix_len": _Flag(int, "N", "Tokens in each prefix."),
        "prefix_repetition_suffix_len": _Flag(int, "N", "Tokens after the prefix, different in each prompt."),
        "prefix_repetition_num_prefixes": _Flag(int, "N", "Different prefixes."),
        "prefix_repetition_output_len": _Flag(int, "N", "Tokens to generate for each."),
        "sharegpt_output_len": _Flag(int, "N", "Tokens to generate. Default: as long as the file's answer."),
        "custom_output_len": _Flag(int, "N", 'Tokens to generate; -1 takes each line\'s "output_tokens".'),
        "timed_trace_speed": _Flag(float, "X", "Play the trace this many times as fast."),
        "prompt_token_ids": _Flag(bool, "", "Send prompts as token ids: lengths are exact, the server reads no text."),
        "disable_shuffle": _Flag(bool, "", "Take the lines of a custom file in their order."),
    },
    "load": {
        "request_rate": _Flag(float, "X", "Requests a second; inf sends all at once."),
        "burstiness": _Flag(float, "X", "1 is Poisson arrivals, less comes in bursts, more is steadier."),
        "ramp_up_strategy": _Flag(str, "NAME", "Change the rate over the run: linear or exponential."),
        "ramp_up_start_rps": _Flag(float, "X", "Rate at its start."),
        "ramp_up_end_rps": _Flag(float, "X", "Rate at its end."),
        "max_concurrency": _Flag(int, "N", "Requests under way at most; others wait in the client."),
        "num_warmups": _Flag(int, "N", "Requests sent before the clock starts. At least one always is."),
    },
    "sampling": {
        "ignore_eos": _Flag(bool, "", "Generate the whole length, whatever the model says."),
        "logprobs": _Flag(int, "N", "Ask for this many log-probabilities a token."),
        "temperature": _Flag(float, "X", "0 is greedy. What is not given here, the server decides."),
        "top_p": _Flag(float, "X", "Nucleus sampling."),
        "top_k": _Flag(int, "N", "Of this many likeliest tokens."),
        "min_p": _Flag(float, "X", "Of tokens at least this fraction as likely as the likeliest."),
        "frequency_penalty": _Flag(float, "X", "-2 to 2."),
        "presence_penalty": _Flag(float, "X", "-2 to 2."),
        "repetition_penalty": _Flag(float, "X", "1 is off."),
        "extra_body": _Flag(_json_object, "JSON", "Fields put into the body of every request."),
        "request_id_prefix": _Flag(str, "TEXT", "The X-Request-Id of each request begins with it."),
    },
    "report": {
        "goodput": _Flag(str, "NAME:MS", "Count requests that keep all of these: ttft:MS tpot:MS e2el:MS.", many=True),
        "percentile_metrics": _Flag(str, "NAMES", "Latencies that are reported, with commas."),
        "metric_percentiles": _Flag(str, "RANKS", "Percentiles that are reported, with commas."),
        "label": _Flag(str, "TEXT", "Goes into the result and its file's name."),
        "metadata": _Flag(str, "NAME=VALUE", "Goes into the result.", many=True),
    },
}


def add_parser(kinds: Any) -> None:
    """To the subparsers of `mini-vllm bench`."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "serve",
        help="a running server, under a load of requests",
        description="Send requests to a server (OpenAI's or Anthropic's API) and measure what its users see.",
        usage="mini-vllm bench serve [options]",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.not_here = NOT_HERE  # type: ignore[attr-defined]
    own = {name: value for flags in DATASET_DEFAULTS.values() for name, value in flags.items()}
    defaults = {field.name: field.default for field in dataclasses.fields(ServeOptions)} | own
    for title, flags in _SECTIONS.items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            _add_flag(group, name, flag, defaults.get(name))
    _add_output_flags(parser.add_argument_group("files and display"))
    parser.set_defaults(run=run, verbose=False)


def _add_flag(group: Any, name: str, flag: _Flag, default: Any) -> None:
    """A flag that stays out of the namespace when it is not given: defaults live in the options."""
    spelt = "--" + name.replace("_", "-")
    if flag.kind is bool:
        group.add_argument(spelt, dest=name, action="store_true", default=argparse.SUPPRESS, help=flag.help)
        return
    shown = f" Default: {default}." if isinstance(default, (str, int, float)) else ""
    group.add_argument(
        spelt, dest=name, type=flag.kind, metavar=flag.metavar, default=argparse.SUPPRESS,
        nargs="+" if flag.many else None, help=flag.help + shown,
    )  # fmt: skip


def _add_output_flags(group: Any) -> None:
    group.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    group.add_argument("--save-detailed", action="store_true", help="With every latency, text and error in it.")
    group.add_argument("--append-result", action="store_true", help="Add a line to the file, in place of writing it.")
    group.add_argument("--result-dir", metavar="DIR", help="Where. Default: here.")
    group.add_argument("--result-filename", metavar="NAME", help="Default: made of backend, rate, model and date.")
    group.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")


def run(args: argparse.Namespace) -> int:
    """Status 1 when no request succeeded; failed ones among others are in the report."""
    from mini_vllm.bench.serve.benchmark import run_serve
    from mini_vllm.bench.serve.report import render
    from mini_vllm.bench.serve.result import with_details

    options = options_from(args)
    folder = _checked_folder(args)
    with _progress(options.num_prompts, args.disable_tqdm) as bar:
        result, records = run_serve(options, _tell, lambda record: bar.update())
    print(render(result, options.latencies, options.percentiles))
    if folder is not None:
        _write(options, with_details(result, records) if args.save_detailed else result, args, folder)
    return 0 if result["completed"] else 1


def options_from(args: argparse.Namespace) -> ServeOptions:
    """What was asked for. Raises `ConfigError`."""
    names = {field.name for field in dataclasses.fields(ServeOptions)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items()
    }
    return ServeOptions(**{name: value for name, value in given.items() if name in names})


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(total: int, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=disable or not sys.stderr.isatty(), unit="request", smoothing=0)


def _checked_folder(args: argparse.Namespace) -> Path | None:
    """The folder of the result, checked before minutes are spent on it; None when nothing is written."""
    if not (args.save_result or args.save_detailed or args.append_result):
        for name in ("result_dir", "result_filename"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name}: nothing is written without --save-result")
        return None
    folder = Path(args.result_dir or ".").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"result_dir: {folder}: {error.strerror}") from error
    return folder


def _write(options: ServeOptions, result: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
    from mini_vllm.bench.result import write_json
    from mini_vllm.bench.serve.result import result_path

    path = result_path(options, str(result["model_id"]), str(folder), args.result_filename)
    if args.append_result:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, allow_nan=False) + "\n")
    else:
        write_json(path, result)
    print(f"written to {path}")

"""What serving costs beside the engine: the API process alone, and a server against the engine it serves.

    api       CPU time of the API process a streamed token and a request, over an engine that computes nothing
    rates     requests a second of the API process over the same
    layers    where a token's time goes: the engine's client, the application, the rest
    model     `mini-vllm serve` against `AsyncLLM` without HTTP, on a model in the shape of Qwen2.5-0.5B
    clients   `bench serve` against guidellm (--guidellm PATH) on the same server

Prints tables and writes one JSON file with versions, shapes, threads and the spread over repetitions. On a machine with
two cores each part has them to itself only if nothing else runs.
"""

import argparse
import json
import logging
import os
import platform
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serving_api import NUM_TOP, PROMPT, Sizes, request_rates, streaming_costs
from serving_layers import CONCURRENCY, layers
from serving_model import FIGURES, Work, compare, compare_clients
from serving_report import shown, table
from step_cost import RESULTS, environment, installed

from mini_vllm.bench.environment import relevant_variables
from mini_vllm.bench.noise import CpuMeter
from mini_vllm.engine.arg_utils import DEFAULT_MODEL

PARTS = ("api", "rates", "layers", "model", "clients")
SERVER_PACKAGES = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "pydantic", "pyzmq")


def run_part(part: str, sizes: Sizes, work: Work, guidellm: str | None) -> Any:
    """What goes into the JSON under the name of the part."""
    if part == "api":
        return streaming_costs(sizes, DEFAULT_MODEL.name)
    if part == "rates":
        return request_rates(sizes, DEFAULT_MODEL.name)
    if part == "layers":
        return layers(sizes)
    if part == "model":
        return compare(work)
    if guidellm is None:
        return {"skipped": "needs an environment with guidellm: --guidellm VENV/bin/guidellm"}
    return compare_clients(work, guidellm)


def text_of(part: str, found: Any) -> str:
    """The part's table."""
    if part in ("model", "clients"):
        return _sides(part, found)
    if part == "layers":
        rows = [[row["what"], shown(row["us_per_token"])] for row in found]
        return table(f"layers: us of CPU a streamed token, {CONCURRENCY} streams", ["", "us/token"], rows)
    titles = {"api": "api: CPU of the API process, streamed", "rates": "rates: not streamed, all tokens at once"}
    columns = {
        "api": (("us_per_token", 1), ("us_per_request", 0), ("tokens_per_event", 2), ("cpu_share", 2)),
        "rates": (("requests_per_second", 0), ("us_per_request", 0), ("cpu_share", 2)),
    }[part]
    rows = [
        [row["what"], str(row["concurrency"]), *(shown(row[name], digits) for name, digits in columns)] for row in found
    ]
    return table(titles[part], ["", "concurrent", *(name for name, _ in columns)], rows)


def _sides(part: str, found: dict[str, Any]) -> str:
    if "skipped" in found:
        return f"{part}: left out; {found['skipped']}"
    rows = [[name, *(shown(side.get(figure)) for figure in FIGURES)] for name, side in found["sides"].items()]
    for name, ratio in found.get("ratios", {}).items():
        rows.append([name, *(shown(ratio.get(figure), 3) for figure in FIGURES)])
    return table(f"{part}: median (lowest-highest repetition)", ["", *FIGURES], rows)


def report_of(args: argparse.Namespace, sizes: Sizes, work: Work) -> dict[str, Any]:
    """The JSON but for the parts."""
    about = environment(argparse.Namespace(threads=None))
    about["versions"] |= {name: installed(name) for name in SERVER_PACKAGES}
    about["variables"] = relevant_variables(os.environ)
    shapes = {
        "api": asdict(sizes) | {"prompt": PROMPT, "num_top_logprobs": NUM_TOP, "model": DEFAULT_MODEL.name},
        "model": asdict(work) | {"hf_config": work.shape, "load_format": "dummy"},
    }
    return {"benchmark": "serving", **about, "quick": args.quick, "shapes": shapes, "noise": {}, "parts": {}}


def default_path() -> Path:
    machine = f"{platform.machine()}-{len(os.sched_getaffinity(0))}cpu"
    return RESULTS / f"serving-{datetime.now(UTC):%Y%m%d}-{machine}.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: does it run?")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--num-requests", type=int, default=None, help="of the parts model and clients; default: 96")
    parser.add_argument("--guidellm", metavar="PATH", help="the command of an environment that has it")
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file; default: benchmarks/results/serving-*.json"
    )
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if sys.platform != "linux":
        print("The CPU time of another process is read as Linux keeps it; run this there.", file=sys.stderr)
        return 2
    logging.getLogger("mini_vllm").setLevel(logging.WARNING)
    sizes = Sizes.quick() if args.quick else replace(Sizes(), repetitions=args.repetitions)
    work = Work.small() if args.quick else replace(Work(), repetitions=args.repetitions)
    if args.num_requests is not None:
        work = replace(work, num_requests=args.num_requests)
    report = report_of(args, sizes, work)
    for part in args.part:
        meter = CpuMeter().start()
        report["parts"][part] = run_part(part, sizes, work, args.guidellm)
        report["noise"][part] = asdict(meter.stop())
        print(f"\n{text_of(part, report['parts'][part])}", flush=True)
    if not args.no_save:
        path = args.output or default_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

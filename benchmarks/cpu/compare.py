"""mini_vllm beside other CPU engines: the same models, widths, prompts and threads, in alternating order.

    make bench-cpu                                                  about ten minutes; ours and the peers found here
    python benchmarks/cpu/compare.py --peers auto llama_cpp=VENV/bin/python openvino_genai=VENV/bin/python
    python benchmarks/cpu/compare.py --model qwen2.5-0.5b --sweeps --minutes 30
    python benchmarks/cpu/compare.py --render benchmarks/results/cpu-....json

Prints a table, and writes JSON and (with sweeps) plots. Ratios are taken round by round. Time is what --minutes gives:
models and classes of widths share it, and a round that would take longer is not begun (one always runs).
"""

import argparse
import dataclasses
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cpu import tasks as tasks_of  # noqa: E402 (found by the line above)
from benchmarks.cpu.costs import ceilings_of, floor, probe, weight_bytes  # noqa: E402
from benchmarks.cpu.plots import plot_all  # noqa: E402
from benchmarks.cpu.report import CLASSES, class_of, text_of  # noqa: E402
from benchmarks.cpu.rounds import Budget, Outcome, run_group, say  # noqa: E402
from benchmarks.cpu.shapes import SHAPES, default_cache, make_checkpoint, model_shape  # noqa: E402
from benchmarks.cpu.tasks import Task  # noqa: E402
from benchmarks.cpu.worker_protocol import VARIANTS, split_width  # noqa: E402
from benchmarks.cpu.workers import OURS, Entrant, Setting, find_peers  # noqa: E402
from mini_vllm.bench.cost import ModelShape  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PEER_WIDTHS = {
    "transformers": ("bf16", "f32"),
    "llama_cpp": ("bf16", "f32", "q8_0", "q4_0"),
    "openvino_genai": ("bf16", "f32", "int8", "int4"),
    "vllm": ("bf16", "f32"),
}
OUR_WIDTHS = ("bf16", "f32", "int8", "int8-weights", "int4", "int4-head")
MAX_DECODE_TOKENS = 256
LARGE = 100e6
"""Parameters above which request lists are shortened by --shrink."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, nargs="+", default=["tiny-15m", "qwen2.5-0.5b"])
    parser.add_argument("--classes", choices=CLASSES, nargs="+", default=list(CLASSES), help="of widths")
    parser.add_argument(
        "--widths",
        nargs="+",
        default=list(OUR_WIDTHS),
        help="of ours (bf16-eager: no captured step; bf16-avx2: kernels of a lesser processor)",
    )
    parser.add_argument("--peers", nargs="+", default=["auto"], metavar="auto|none|NAME=PYTHON")
    parser.add_argument("--peer-widths", nargs="+", metavar="NAME:WIDTH", help="only these")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--threads", type=int, help="of every engine; default: what mini_vllm would choose")
    parser.add_argument("--decode-gb", type=float, default=15.0, help="weights read by a slice of decoding, in 16 bits")
    parser.add_argument("--shrink", type=int, default=8, help="divides the lengths of large models' request lists")
    parser.add_argument("--step-tokens", type=int, default=512, help="tokens of all sequences in one step")
    parser.add_argument("--only", nargs="+", metavar="TASK", help="tasks whose names begin so")
    parser.add_argument("--sweeps", action="store_true", help="batch 1 to 64 and context 128 to 8k")
    parser.add_argument("--max-context", type=int, default=tasks_of.CONTEXTS[-1], help="longest of the sweep")
    parser.add_argument("--long", type=int, nargs="*", metavar="TOKENS", help="long prompts; default: 8064 if small")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where models are made and kept")
    parser.add_argument("--output", type=Path, help="JSON file; default: under benchmarks/results/")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--render", type=Path, metavar="JSON", help="only make table and plots of an earlier run")
    return parser.parse_args(argv)


def choose_tasks(args: argparse.Namespace, shape: ModelShape) -> list[Task]:
    """The rows of one model's table, of lengths that suit its size."""
    large = shape.num_parameters > LARGE
    by_size = round(args.decode_gb * 1e9 / shape.weight_bytes_per_decode_step)
    more = max(4, min(MAX_DECODE_TOKENS, by_size))
    shrink = args.shrink if large else 1
    long = args.long if args.long is not None else ([] if large else [8064])
    chosen = [tasks_of.decoding("decode, 1 stream", 1, 128, more), tasks_of.prefill(512)]
    chosen += [tasks_of.request_list(shrink), tasks_of.mixed_steps(shrink), *map(tasks_of.prefill, long)]
    if args.sweeps:
        contexts = [tokens for tokens in tasks_of.CONTEXTS if tokens <= args.max_context]
        chosen += tasks_of.sweeps(more, tasks_of.BATCHES, contexts)
    return [task for task in chosen if not args.only or task.name.startswith(tuple(args.only))]


def choose_entrants(args: argparse.Namespace, pythons: dict[str, str]) -> list[list[Entrant]]:
    """Those that take turns, for each class of widths."""
    entrants = [Entrant(OURS, width) for width in args.widths]
    for engine, python in pythons.items():
        widths = PEER_WIDTHS[engine]
        entrants += [
            Entrant(engine, width, python)
            for width in widths
            if args.peer_widths is None or f"{engine}:{width}" in args.peer_widths
        ]
    groups = [[e for e in entrants if class_of(e.width) == name] for name in args.classes]
    return [group for group in groups if group]


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for widths that nobody has and for names of peers that are none."""
    if unknown := sorted(width for width in args.widths if split_width(width)[0] not in OUR_WIDTHS):
        there = f"{', '.join(OUR_WIDTHS)}, alone or with {', '.join(f'-{variant}' for variant in VARIANTS)}"
        raise ValueError(f"--widths: {', '.join(unknown)} is unknown; there are {there}")
    there = {f"{engine}:{width}" for engine, widths in PEER_WIDTHS.items() for width in widths}
    if unknown := sorted(set(args.peer_widths or ()) - there):
        raise ValueError(f"--peer-widths: {', '.join(unknown)} is unknown; there are {', '.join(sorted(there))}")


def compare_model(name: str, groups: list[list[Entrant]], args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """Run one model's groups, and return its record."""
    shape = model_shape(name)
    chosen = choose_tasks(args, shape)
    if not chosen:
        raise ValueError(f"--only: no task begins with {' or '.join(args.only)}")
    setting = Setting(
        model=make_checkpoint(name, args.cache), cache=args.cache, threads=args.threads,
        max_len=max(task.longest for task in chosen) + 16, max_seqs=max(len(task.requests) for task in chosen),
        step_tokens=args.step_tokens, kv_tokens=max(task.total for task in chosen) + 1024,
    )  # fmt: skip
    outcome = Outcome()
    for group in groups:
        say(f"{name}: {', '.join(entrant.name for entrant in group)}")
        working_set = weight_bytes(shape, group[0].width)
        run_group(
            group, chosen, setting, partial(probe, args.threads, working_set), outcome,
            rounds=args.rounds, seconds=budget.take(weight_of(name)),
        )  # fmt: skip
        if outcome.interrupted:
            break
    return record_of(shape, chosen, outcome)


def compare_models(groups: list[list[Entrant]], args: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    """The record of each model; those not reached before an interrupt are left out."""
    records: dict[str, Any] = {}
    for name in args.model:
        records[name] = compare_model(name, groups, args, budget)
        if records[name]["interrupted"]:
            break
    return records


def weight_of(name: str) -> float:
    """Large models get more of the time."""
    return 3.0 if model_shape(name).num_parameters > LARGE else 1.0


def record_of(shape: ModelShape, chosen: Sequence[Task], outcome: Outcome) -> dict[str, Any]:
    """Slices, floors and what they were computed from, as plain data."""
    if not outcome.probes:
        raise ValueError("nothing was measured before the interrupt")
    ceilings = ceilings_of(outcome.probes)
    floors = {
        f"{task.name}|{entrant}": floor(shape, task, entrant.split(" ", 1)[1], ceilings) | {"counted": task.counted}
        for task in chosen
        for entrant in outcome.entrants
    }
    listed = [dataclasses.asdict(task) | {"requests": [list(pair) for pair in task.requests]} for task in chosen]
    return {"tasks": listed, "ceilings": ceilings, "floors": floors, **dataclasses.asdict(outcome)}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as plain data."""
    from mini_vllm.bench.environment import collect_environment

    pythons, absent = find_peers(args.peers)
    for engine, why in absent.items():
        say(f"absent: {engine}: {why}")
    groups = choose_entrants(args, pythons)
    args.cache.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    budget = Budget(begin + args.minutes * 60, len(groups) * sum(weight_of(name) for name in args.model))
    environment = collect_environment()
    environment["system"].pop("executable", None)  # a path of this machine
    return {
        "benchmark": "cpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": args.threads,
        "models": compare_models(groups, args, budget),
        "absent": absent,
        "seconds": round(time.monotonic() - begin, 1),
        "arguments": {
            key: value for key, value in vars(args).items() if key not in ("cache", "output", "peers", "render")
        },
        "environment": environment,
    }


def default_output() -> Path:
    from mini_vllm.bench.noise import usable_cpus

    return RESULTS / f"cpu-{datetime.now(UTC):%Y%m%d-%H%M}-{platform.machine()}-{len(usable_cpus())}cpu.json"


def show(report: dict[str, Any], file: Path | None) -> None:
    """The tables on the terminal, and the plots beside `file`."""
    print(f"\n{text_of(report)}")
    for path in plot_all(report, file) if file is not None else ():
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.render:
        show(json.loads(args.render.read_text(encoding="utf-8")), args.render)
        return 0
    if args.threads is None:
        from mini_vllm.platforms import current_platform

        args.threads = current_platform.num_threads()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is kept
    try:
        check(args)
        report = compare(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    file = None if args.no_save else args.output or default_output()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {file}")
    show(report, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

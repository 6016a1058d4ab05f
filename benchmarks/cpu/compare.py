"""mini_vllm beside other CPU engines: the same models, widths, prompts and threads, in alternating order.

Every engine with every width is a process that stays. A round gives each of them the same task in turn, forwards in one
round and backwards in the next, so that a machine whose speed drifts drifts for all; ratios are taken round by round.
Memory bandwidth and arithmetic are probed in every round.

    make bench-cpu                                                  ours and the peers that this environment has
    python benchmarks/cpu/compare.py --peers llama_cpp=VENV/bin/python,openvino=VENV2/bin/python
    python benchmarks/cpu/compare.py --render benchmarks/results/cpu-....json
"""

import argparse
import json
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import report
from shapes import SHAPES, default_cache, make_checkpoint
from tasks import Task, long_prompt, main_tasks, sweep_tasks
from workers import Entrant, Worker, WorkerError, find_peers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PEER_WIDTHS = {
    "transformers": ("bf16", "f32"),
    "llama_cpp": ("bf16", "q8_0", "q4_0"),
    "openvino": ("f32", "int8", "int4"),
    "vllm": ("bf16", "f32"),
}
OUR_WIDTHS = ("bf16", "int8", "int8-weights", "int4", "int4-head")
PAUSE_SECONDS = 0.2
"""Between slices: threads of the engine before may still spin."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--widths", nargs="+", default=list(OUR_WIDTHS), help="of ours (also f32, and bf16-eager)")
    parser.add_argument("--peers", default="auto", help="auto, none, or NAME=PYTHON,... (default: auto)")
    parser.add_argument("--peer-widths", nargs="+", default=None, metavar="NAME:WIDTH", help="only these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--decode-tokens", type=int, default=16, help="tokens that decoding is timed over")
    parser.add_argument("--scale", type=float, default=1.0, help="shortens the lists of requests")
    parser.add_argument("--only", nargs="+", default=None, help="tasks whose names begin so")
    parser.add_argument("--sweeps", action="store_true", help="batch 1 to 64 and context 128 to 8k as well")
    parser.add_argument("--long", type=int, default=0, metavar="TOKENS", help="a prompt as long as this as well")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where models are kept")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; default: under benchmarks/results/")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--render", type=Path, default=None, metavar="JSON", help="table and plots of an earlier run")
    return parser.parse_args(argv)


def choose_tasks(args: argparse.Namespace) -> list[Task]:
    tasks = main_tasks(args.decode_tokens, args.scale)
    if args.sweeps:
        tasks += sweep_tasks(args.decode_tokens, (1, 2, 4, 8, 16, 32, 64), (128, 512, 2048, 8000))
    if args.long:
        tasks.append(long_prompt(args.long))
    if args.only:
        tasks = [task for task in tasks if task.name.startswith(tuple(args.only))]
    return tasks


def choose_entrants(args: argparse.Namespace) -> list[Entrant]:
    pythons, absent = find_peers(args.peers)
    for engine in absent:
        print(f"absent: {engine} (install it and name its python: --peers {engine}=PYTHON)")
    entrants = [Entrant("mini_vllm", width) for width in args.widths]
    for engine, python in pythons.items():
        entrants += [Entrant(engine, width, python) for width in PEER_WIDTHS[engine]]
    if args.peer_widths is not None:
        entrants = [e for e in entrants if e.engine == "mini_vllm" or f"{e.engine}:{e.width}" in args.peer_widths]
    return entrants


def start_all(
    entrants: list[Entrant], model: Path, args: argparse.Namespace, limits: tuple[int, int]
) -> tuple[list[Worker], dict[str, str]]:
    """(those that started, why the others did not)."""
    workers, failures = [], {}
    for entrant in entrants:
        begin = time.perf_counter()
        try:
            log = args.cache / "workers.log"
            workers.append(Worker.start(entrant, model, args.cache, args.threads, limits, log))
            print(f"started {entrant.name} {workers[-1].version} in {time.perf_counter() - begin:.0f} s", flush=True)
        except WorkerError as error:
            failures[entrant.name] = str(error)
            print(f"failed: {error}", flush=True)
    return workers, failures


def run_slice(worker: Worker, task: Task, seed: int) -> dict[str, Any]:
    """One task by one engine: seconds of its calls, and the figure or the error."""
    found: dict[str, Any] = {"task": task.name, "entrant": worker.entrant.name, "round": seed}
    try:
        found["seconds"] = [worker.complete(prompts, tokens) for prompts, tokens in task.calls(seed)]
        found["figure"] = task.figure(found["seconds"])
    except (WorkerError, ValueError) as error:
        found["error"] = str(error)
    time.sleep(PAUSE_SECONDS)
    return found


def run_rounds(workers: list[Worker], tasks: list[Task], args: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """(slices, probes). Each worker warms up with the first call of every task."""
    slices, probes = [], []
    for worker in workers:
        for task in tasks[:3]:
            run_slice(worker, task, -1)
    for number in range(args.rounds):
        probes.append(probe(args.threads))
        for task in tasks:
            for worker in workers if number % 2 == 0 else reversed(workers):
                slices.append(run_slice(worker, task, number))
        print(f"round {number + 1} of {args.rounds}: {probes[-1]}", flush=True)
    return slices, probes


def probe(threads: int) -> dict[str, float]:
    """GB/s read from memory and float32 GFLOP/s of a product, now."""
    import torch

    from mini_vllm.bench.ceilings import gemm_rate, read_rate

    torch.set_num_threads(threads)
    read = read_rate.__wrapped__(512 << 20, threads).gb_s
    return {"read_gb_s": round(read, 2), "gflop_s": round(gemm_rate.__wrapped__("float32", threads).gflop_s, 1)}


def floors(args: argparse.Namespace, tasks: list[Task], entrants: list[str], probes: list[Any]) -> dict[str, Any]:
    """What the machine would give: bandwidth over bytes for one stream, arithmetic over operations for a prompt."""
    shape, found = SHAPES[args.model], {}
    read, flops = (statistics.median(p[key] for p in probes) * 1e9 for key in ("read_gb_s", "gflop_s"))
    for task in tasks:
        for entrant in entrants:
            num_bytes = shape.decode_bytes(entrant.split(" ", 1)[1])
            if task.more and task.batch == 1 and num_bytes and task.context <= 128:
                found[f"{task.name}|{entrant}"] = {"tokens_per_second": read / num_bytes, "what": "the bandwidth"}
            if not task.more and task.batch == 1:
                most = task.context * flops / shape.prefill_flops(task.context)
                found[f"{task.name}|{entrant}"] = {"tokens_per_second": most, "what": "torch's float32 product"}
    return found


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    from mini_vllm.bench.environment import collect_environment

    tasks, entrants = choose_tasks(args), choose_entrants(args)
    args.cache.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(args.model, args.cache)
    limits = max(task.longest for task in tasks) + 16, max(task.most_sequences for task in tasks)
    begin = time.perf_counter()
    workers, failures = start_all(entrants, model, args, limits)
    try:
        slices, probes = run_rounds(workers, tasks, args)
    finally:
        for worker in workers:
            worker.stop()
    names = [worker.entrant.name for worker in workers]
    ours = [name for name in names if name.startswith("mini_vllm ")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": args.model,
        "threads": args.threads,
        "rounds": args.rounds,
        "seconds": round(time.perf_counter() - begin, 1),
        "entrants": {w.entrant.name: {"version": w.version, **w.details} for w in workers},
        "failures": failures,
        "tasks": [task.name for task in tasks],
        "probes": probes,
        "floors": floors(args, tasks, ours, probes),
        "slices": slices,
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("cache", "output", "peers")},
        "environment": collect_environment(),
    }


def show(record: dict[str, Any], file: Path | None) -> None:
    """The tables on the terminal, and the plots beside `file`."""
    main = [t for t in record["tasks"] if not t.startswith(("batch ", "context "))]
    read = [p["read_gb_s"] for p in record["probes"]]
    print(f"\n{record['model']}, {record['threads']} threads, {record['rounds']} rounds, {record['date']}")
    print(f"memory read at {report.spread(read)} GB/s\n")
    print("\n".join(report.table(record, main)), "\n")
    print("\n".join(report.peers_table(record, record["tasks"])))
    for entrant, why in record["failures"].items():
        print(f"failed: {entrant}: {why}")
    errors = {(s["entrant"], s["task"]): s["error"] for s in record["slices"] if "error" in s}
    for (entrant, task), why in errors.items():
        print(f"failed: {entrant}, {task}: {why}")
    if file is not None:
        for path in report.plot(record, file):
            print(f"plot: {path}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.render:
        show(json.loads(args.render.read_text(encoding="utf-8")), args.render)
        return 0
    record = compare(args)
    file = None
    if not args.no_save:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M")
        file = args.output or RESULTS / f"cpu-{args.model}-{stamp}.json"
        file.write_text(json.dumps(record, indent=1), encoding="utf-8")
        print(f"record: {file}")
    show(record, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())

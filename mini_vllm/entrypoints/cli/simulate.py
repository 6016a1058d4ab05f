"""`mini-vllm simulate`: serve a workload in simulated time with the engine's own scheduler, and say how it went.

Nothing is loaded and no model runs, except by `--calibrate`, which measures this machine.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mini_vllm.entrypoints.cli.arguments import HelpFormatter
from mini_vllm.entrypoints.cli.simulate_arguments import add_scenario_flags, scenario_from
from mini_vllm.exceptions import ConfigError

if TYPE_CHECKING:
    from mini_vllm.simulator.results import SimulationResult
    from mini_vllm.simulator.scenario import Scenario
    from mini_vllm.simulator.sweep import SweepPoint

_EXAMPLES = """\
examples:
  mini-vllm simulate --preset llama-3-8b --gpu a100-80g --rate 4 --num-requests 5000 --report out/
  mini-vllm simulate --preset llama-3-8b --gpu l4 --users 32 --think-time 5 --turns uniform:1,8
  mini-vllm simulate --preset llama-3-8b --gpu a100-80g --sweep rate=1,2,4,8,16 --report sweep/
  mini-vllm simulate --preset llama-3-8b --gpu a100-80g --rate 4 --capacity rate --limit 'p99_ttft_ms<=500'
  mini-vllm simulate --trace requests.jsonl --num-replicas 4 --routing prefix-aware --json -
  mini-vllm simulate --calibrate step_cost.json                    measures the engine on this machine, then:
  mini-vllm simulate --cost-file step_cost.json --rate 20 --prompt-len lognormal:200,1
  mini-vllm simulate --step-ms 20 --token-us 50 --num-gpu-blocks-override 4000 --rate 8 --chrome-trace trace.json
  mini-vllm simulate fragmentation                                 what paging buys
"""
DEFAULT_TRACE_STEPS = 2000
NOISY_SHARE = 0.15
"""Of the steps of a calibration."""

_FRAGMENTATION = {
    "num_sequences": (int, "Sequences in all."),
    "arrivals_per_step": (float, "Of them, on average."),
    "kv_cache_tokens": (int, "What each cache has room for."),
    "block_size": (int, "Tokens in a block."),
    "shared_prefix_tokens": (int, "That the prompts of a group begin with."),
    "num_prefix_groups": (int, "Groups, each with a prefix of its own."),
    "seed": (int, "Of everything random."),
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "simulate",
        help="serve a workload in simulated time with the real scheduler",
        description="Serve a workload in simulated time with the engine's own scheduler and block manager.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_scenario_flags(parser)
    _add_study_flags(parser)
    _add_output_flags(parser)
    parser.set_defaults(run=run, study=None)
    studies = parser.add_subparsers(title="studies", dest="study", metavar="[fragmentation]", required=False)
    _add_fragmentation(studies)


def _add_study_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("in place of a single run")
    group.add_argument("--sweep", action="append", metavar="NAME=V1,V2,...", default=[],
                       help="Run for each of these values of an engine argument or load; several make a grid."
                       )  # fmt: skip
    group.add_argument(
        "--capacity", metavar="NAME", help="Search the largest rate (or users) that keeps every --limit."
    )
    group.add_argument("--limit", action="append", metavar="FIGURE<=X", default=[],
                       help="Such as p99_ttft_ms<=500, for --capacity and for the best point of --sweep.")  # fmt: skip
    group.add_argument("--maximise", metavar="FIGURE", help="Of a sweep: name the best point by this figure.")
    group.add_argument("--minimise", metavar="FIGURE", help="The same the other way round.")
    group.add_argument("--processes", type=int, default=None, metavar="N",
                       help="Points of a sweep tried at once. Default: the cores of this machine.")  # fmt: skip
    group.add_argument("--lowest", type=float, default=None, metavar="X",
                       help="Smallest load that --capacity tries. Default: 0.1, or 1 user.")  # fmt: skip
    group.add_argument("--highest", type=float, default=None, metavar="X",
                       help="Largest load that --capacity tries. Default: doubled until a limit breaks.")  # fmt: skip
    group.add_argument("--tolerance", type=float, default=None, metavar="X",
                       help="Relative width at which --capacity stops. Default: 0.02.")  # fmt: skip
    group.add_argument("--calibrate", metavar="FILE", help="Measure steps of the engine on this machine, fit a cost to "
                       "them and write it here; --model and the engine's flags apply.")  # fmt: skip
    group.add_argument("--calibrate-seconds", type=float, default=40.0, metavar="S",
                       help="About how long that takes; longer is steadier. Default: 40.")  # fmt: skip


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--report", metavar="DIR", help="Write a page with pictures and all numbers to this folder.")
    group.add_argument("--json", metavar="FILE", help="Write every figure as JSON; - is standard output.")
    group.add_argument(
        "--csv", metavar="FILE", help="Write the figures (of a sweep: a line a point) as CSV; - as above."
    )
    group.add_argument("--chrome-trace", metavar="FILE", help="Write the last steps for Perfetto or chrome://tracing.")
    group.add_argument("--chrome-trace-steps", type=int, default=DEFAULT_TRACE_STEPS, metavar="N",
                       help=f"How many. Default: {DEFAULT_TRACE_STEPS}.")  # fmt: skip
    group.add_argument("-v", "--verbose", action="store_true", help="Show what is done on standard error.")


def _add_fragmentation(studies: Any) -> None:
    parser = studies.add_parser(
        "fragmentation",
        help="naive contiguous cache against paged, with and without shared prefixes",
        description="The same sequences through a naive, a paged, and a paged cache with shared prefixes.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    for name, (kind, text) in _FRAGMENTATION.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N", default=argparse.SUPPRESS, help=text)
    parser.add_argument("--report", metavar="DIR", help="Write the plot, SVG and PNG, to this folder.")
    parser.add_argument("--json", metavar="FILE", help="Write the figures as JSON; - is standard output.")
    parser.add_argument("-v", "--verbose", action="store_true", help="Show what is done on standard error.")
    parser.set_defaults(run=run_fragmentation_study)


# --- running ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    from mini_vllm.simulator.plots.style import require_matplotlib

    given = dict(vars(args))
    if args.calibrate:
        return _calibrate(args, given)
    if (args.limit or args.maximise or args.minimise) and not (args.sweep or args.capacity):
        raise ConfigError("limit, maximise, minimise: only have a meaning with sweep or capacity")
    if not args.capacity and not args.lowest is args.highest is args.tolerance is None:
        raise ConfigError("lowest, highest, tolerance: only have a meaning with capacity")
    if args.report and not args.calibrate:
        require_matplotlib()  # before minutes of simulation, not after them
    if args.sweep and args.capacity:
        raise ConfigError("capacity: cannot be searched in a sweep; give one of the two")
    if args.chrome_trace and (args.sweep or args.capacity):
        raise ConfigError("chrome_trace: is of a single run")
    if args.sweep:
        return _sweep(args, scenario_from(given))
    if args.capacity:
        return _capacity(args, scenario_from(given))
    return _single(args, scenario_from(given, step_records=args.chrome_trace_steps if args.chrome_trace else 0))


def _single(args: argparse.Namespace, scenario: "Scenario") -> int:
    from mini_vllm.simulator.report import write_report

    with _progress("simulating") as advance:
        result = scenario.run(advance)
    if not _to_stdout(args):
        _print_tables(result, scenario)
    if args.json:
        _write(args.json, json.dumps(result.as_dict(scenario.slo), indent=1) + "\n")
    if args.csv:
        metrics = result.metrics(scenario.slo)
        rows = [",".join(metrics), ",".join("" if value is None else str(value) for value in metrics.values())]
        _write(args.csv, "\n".join(rows) + "\n")
    if args.chrome_trace:
        _write(args.chrome_trace, json.dumps(_chrome_trace(result)) + "\n")
    if args.report:
        _say(f"report: {write_report(result, args.report, _question('Simulation'), scenario.slo)}")
    return 0


def _chrome_trace(result: "SimulationResult") -> dict[str, Any]:
    """One process of the trace per replica; all on one clock, which begins with the first step kept."""
    from mini_vllm.engine.chrome_trace import chrome_trace

    kept = [replica.step_records for replica in result.replicas if replica.step_records]
    origin = min((records[0].start_time for records in kept), default=0.0)
    merged: dict[str, Any] = {"traceEvents": [], "displayTimeUnit": "ms"}
    for number, records in enumerate(kept):
        shift = (records[0].start_time - origin) * 1e6
        for event in chrome_trace(records)["traceEvents"]:
            event["pid"] = number + 1
            event["ts"] += 0 if event["ph"] == "M" else shift
            if event["name"] == "process_name":
                event["args"] = {"name": f"replica {number} (simulated)"}
            merged["traceEvents"].append(event)
    return merged


def _sweep(args: argparse.Namespace, scenario: "Scenario") -> int:
    from mini_vllm.simulator.constraints import parse_constraint
    from mini_vllm.simulator.report import write_sweep_report
    from mini_vllm.simulator.sweep import grid, parse_axis, run_sweep
    from mini_vllm.simulator.sweep_render import sweep_csv, sweep_json, sweep_table

    axes, limits = [parse_axis(text) for text in args.sweep], [parse_constraint(text) for text in args.limit]
    if limits and not (args.maximise or args.minimise):
        raise ConfigError("limit: a sweep needs --maximise or --minimise to choose among the points that keep it")
    scenario.check_names(axis.name for axis in axes)
    done, total = 0, len(grid(axes))
    with _progress("points") as advance:

        def count(point: "SweepPoint") -> None:
            nonlocal done
            done += 1
            advance(done, total)

        result = run_sweep(scenario, axes, processes=args.processes or os.cpu_count() or 1, progress=count)
    marked: list[SweepPoint] = []
    if args.maximise or args.minimise:
        marked = [result.best(limits, maximise=args.maximise or "", minimise=args.minimise or "")]
    if not _to_stdout(args):
        print(sweep_table(result, marked=marked))
        for line in (*result.knees(), *result.attainments()):
            print(line)
    if args.json:
        _write(args.json, sweep_json(result))
    if args.csv:
        _write(args.csv, sweep_csv(result))
    if args.report:
        page = write_sweep_report(result, args.report, _question("Sweep"), slo=scenario.slo, marked=marked)
        _say(f"report: {page}")
    return 0


def _capacity(args: argparse.Namespace, scenario: "Scenario") -> int:
    from mini_vllm.simulator.constraints import parse_constraint
    from mini_vllm.simulator.report import write_capacity_report
    from mini_vllm.simulator.report.folder import capacity_dict
    from mini_vllm.simulator.scenario import slo_limits

    limits = [parse_constraint(text) for text in args.limit] + (slo_limits(scenario.slo) if scenario.slo else [])
    lowest = (1.0 if args.capacity in ("users", "num_users") else 0.1) if args.lowest is None else args.lowest
    found = scenario.capacity(
        limits, args.capacity, lowest, args.highest, tolerance=0.02 if args.tolerance is None else args.tolerance,
        attempted=lambda probe: _say(_probe(probe)),
    )  # fmt: skip
    edge = "no load broke them" if found.broken_at is None else f"broken at {found.broken_at:.4g}"
    answer = f"{args.capacity} {found.load:.4g} keeps {' and '.join(map(str, limits))}; {edge}"
    if not _to_stdout(args):
        print(answer + ("" if found.monotone else "; not monotone: some higher load keeps them, too"))
    if args.csv:
        raise ConfigError("csv: a capacity search is written as JSON or as a report")
    if args.json:
        _write(args.json, json.dumps(capacity_dict(found, args.capacity), indent=1) + "\n")
    if args.report:
        _say(f"report: {write_capacity_report(found, args.report, _question('Capacity'), args.capacity, answer)}")
    return 0


def _probe(probe: Any) -> str:
    return f"{probe.load:.4g}: {'kept' if probe.ok else probe.why}"


def _calibrate(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from mini_vllm.bench.result import require_writable
    from mini_vllm.engine.arg_utils import EngineArgs
    from mini_vllm.engine.llm_engine import LLMEngine
    from mini_vllm.simulator.calibrate import calibrate

    target = require_writable(args.calibrate)
    names = {field.name for field in dataclasses.fields(EngineArgs)}
    engine_args = EngineArgs.from_kwargs(
        **{"disable_log_stats": True} | {name: value for name, value in given.items() if name in names}
    )
    engine = LLMEngine.from_engine_args(engine_args)
    try:
        with _progress("measuring") as advance:
            cost = calibrate(
                engine, seconds=args.calibrate_seconds, seed=given.get("seed", 0),
                progress=lambda what, passed, total: advance(passed, total),
            )  # fmt: skip
    finally:
        engine.shutdown()
    cost.save(target)
    quality = cost.quality
    if quality["disturbed_share"] > NOISY_SHARE:
        _say(
            f"warning: something else slowed {quality['disturbed_share']:.0%} of the steps; on average all took "
            f"{cost.slowdown:.2f} times as long as the others, and so they do in the simulation"
        )
    print(
        f"{quality['num_steps']:.0f} steps, median relative error {quality['median_relative_error']:.1%}, 90 % within "
        f"{quality['p90_relative_error']:.1%}, all together {quality['total_relative_error']:+.1%}; written to {target}"
    )
    return 0


def run_fragmentation_study(args: argparse.Namespace) -> int:
    from mini_vllm.simulator.fragmentation import FragmentationOptions, run_fragmentation
    from mini_vllm.simulator.fragmentation_plot import plot_fragmentation

    names = {field.name for field in dataclasses.fields(FragmentationOptions)}
    options = FragmentationOptions(**{name: value for name, value in vars(args).items() if name in names})
    with _progress("sequences") as advance:
        result = run_fragmentation(options, lambda mode, done, total: advance(done, total))
    found = result.as_dict()
    if args.json != "-":
        for mode, summary in found["modes"].items():
            print(mode + ": " + ", ".join(f"{name} {_short(value)}" for name, value in summary.items()))
    if args.json:
        _write(args.json, json.dumps(found, indent=1) + "\n")
    if args.report:
        _say("plot: " + ", ".join(map(str, plot_fragmentation(result, args.report))))
    return 0


# --- output -----------------------------------------------------------------------------------------------------


def _print_tables(result: "SimulationResult", scenario: "Scenario") -> None:
    from rich.console import Console
    from rich.table import Table

    from mini_vllm.simulator.report import answers

    # a pipe has no width of its own, and wrapped tables are hard to read in logs
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    metrics = result.metrics(scenario.slo)
    console.print(answers.in_one_sentence(result, scenario.slo))
    parts: list[tuple[Any, Any]] = [
        (answers.LATENCY_HEAD, answers.latency_rows(metrics)),
        (("throughput", ""), answers.rate_rows(metrics)),
        (("inside the engine", ""), answers.engine_rows(metrics)),
    ]
    if len(result.tenants) > 1:
        parts.append((answers.TENANT_HEAD, answers.tenant_rows(result.by_tenant(scenario.slo))))
    if len(result.replicas) > 1:
        parts.append((answers.REPLICA_HEAD, answers.replica_rows(result)))
    for head, rows in parts:
        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        console.print(table)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _to_stdout(args: argparse.Namespace) -> bool:
    return "-" in (args.json, args.csv)


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _question(title: str) -> Any:
    from mini_vllm.simulator.report import Question

    return Question(title, "mini-vllm " + shlex.join(sys.argv[1:]))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Writes report folders: `index.html`, pictures as SVG and PNG, and the numbers as JSON and CSV.

One call each for a run, a sweep and a capacity search. The folder is made; files of an earlier report in it are
replaced, and nothing else in it is touched. Without matplotlib nothing is written at all.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_vllm.engine.chrome_trace import chrome_trace
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.capacity import Capacity
from mini_vllm.simulator.plots.runs import run_pictures
from mini_vllm.simulator.plots.style import Picture, require_matplotlib
from mini_vllm.simulator.plots.sweeps import capacity_search, slo_attainment, sweep_pictures
from mini_vllm.simulator.report import answers
from mini_vllm.simulator.report.page import Image, Page, Table, render_page
from mini_vllm.simulator.results import SLO, TIMELINE_COLUMNS, RequestTable, SimulationResult
from mini_vllm.simulator.sweep import LOADS, SweepPoint, SweepResult
from mini_vllm.simulator.sweep_render import COLUMNS, sweep_cells, sweep_csv

IMAGES = "images"

_REQUEST_COLUMNS = (
    "index", "tenant", "replica", "arrival", "scheduled", "first_token", "finish", "num_prompt_tokens",
    "num_cached_tokens", "num_output_tokens", "num_preemptions", "failed",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What was asked. command: as it was typed. config: whatever made the run, ready for JSON."""

    title: str = "Simulation"
    command: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    result: SimulationResult, folder: str | Path, question: Question | None = None, slo: SLO | None = None
) -> Path:
    """The report of one run; returns the path of its page.

    Writes index.html, images/, results.json, config.json, requests.csv, steps.csv (the timelines, in at most
    `timeline_points` bins a replica), and trace.json where the run kept its step records. Raises `ConfigError` when
    matplotlib is missing or the folder cannot be written.
    """
    asked = question or Question()
    config = {**result.as_dict()["options"], **result.description, **asked.config}
    writer = _Folder(folder)
    writer.pictures(run_pictures(result, slo))
    writer.json("results.json", result.as_dict(slo), "every figure and the timelines")
    writer.json("config.json", config, "what was asked")
    writer.csv("requests.csv", _request_rows(result), "one line a request")
    writer.csv("steps.csv", _step_rows(result), "the timelines: one line a bin of steps, per replica")
    if any(replica.step_records for replica in result.replicas):
        records = result.replicas[0].step_records
        what = "the last steps of replica 0, for Perfetto or chrome://tracing"
        writer.json("trace.json", chrome_trace(records), what)
    return writer.page(asked, answers.in_one_sentence(result, slo), _run_tables(result, slo), config)


def write_sweep_report(
    result: SweepResult, folder: str | Path, question: Question | None = None, *, slo: SLO | None = None,
    marked: Sequence[SweepPoint] = (), answer: str = "",
) -> Path:  # fmt: skip
    """The report of a sweep: its table, its pictures, sweep.json and sweep.csv.

    marked: points that were chosen. answer: what was chosen and why.
    """
    asked = question or Question("Sweep")
    writer = _Folder(folder)
    writer.pictures(_sweep_pictures(result, slo))
    writer.json("sweep.json", result.as_dict(), "every point with every figure")
    writer.text("sweep.csv", sweep_csv(result), "the same as a table")
    writer.json("config.json", asked.config, "what was asked")
    head, rows = sweep_cells(result)
    stars = [number for number, point in enumerate(result.points) if point in marked]
    note = "Latencies in ms." + (" The chosen point stands out." if stars else "")
    table = Table(rows, head, "Answers", note, stars)
    axes = ", ".join(f"{axis.name} ({len(axis.values)} values)" for axis in result.axes)
    ran = f"{len(result.done)} of {len(result.points)} points ran, over {axes}."
    chosen = [f"The chosen point: {point.name}." for point in marked]
    found = [f"{text[0].upper()}{text[1:]}." for text in (*result.knees(), *result.attainments())]
    said = answer or " ".join([ran, *chosen, *found])
    return writer.page(asked, said, [table], asked.config)


def write_capacity_report(found: Capacity, folder: str | Path, question: Question | None = None, load: str = "rate",
                          answer: str = "") -> Path:  # fmt: skip
    """The report of a capacity search: what it found, every load it tried, capacity.json."""
    asked = question or Question("Capacity")
    writer = _Folder(folder)
    writer.pictures([capacity_search(found, LOADS.get(load, load))])
    writer.json("capacity.json", capacity_dict(found, load), "the answer and every load that was tried")
    writer.json("config.json", asked.config, "what was asked")
    rows = [
        [f"{probe.load:.4g}", "kept" if probe.ok else "broken", *_probe_cells(probe.metrics), probe.why]
        for probe in found.probes
    ]
    head = (load, "limits", *_PROBE_COLUMNS.values(), "why")
    return writer.page(asked, answer, [Table(rows, head, "Every load that was tried")], asked.config)


_PROBE_COLUMNS = {name: COLUMNS[name] for name in ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "p99_tpot_ms")}


def _probe_cells(metrics: Mapping[str, Any]) -> list[str]:
    return [answers.shown(metrics.get(name)) for name in _PROBE_COLUMNS]


def capacity_dict(found: Capacity, load: str = "rate") -> dict[str, Any]:
    """Ready for JSON."""
    return {
        "load": load,
        "capacity": found.load,
        "broken_at": found.broken_at,
        "tolerance": found.tolerance,
        "monotone": found.monotone,
        "metrics": dict(found.probe.metrics),
        "tried": [{"load": p.load, "ok": p.ok, "why": p.why, "metrics": dict(p.metrics)} for p in found.probes],
    }


# --- parts -------------------------------------------------------------------------------------------------------


def _sweep_pictures(result: SweepResult, slo: SLO | None) -> list[Picture]:
    pictures = sweep_pictures(result, slo.ttft_ms if slo else None)
    if any("slo_attainment" in point.metrics for point in result.done):
        loads = [axis.name for axis in result.axes if axis.name in LOADS and len(axis.values) > 1]
        pictures += [slo_attainment(result, name) for name in loads]
    return pictures


def _run_tables(result: SimulationResult, slo: SLO | None) -> list[Table]:
    metrics = result.metrics(slo)
    tables = [
        Table(answers.latency_rows(metrics), answers.LATENCY_HEAD, "Latency"),
        Table(answers.rate_rows(metrics), caption="Throughput", note=_slo_text(slo)),
        Table(answers.engine_rows(metrics), caption="Inside the engine"),
    ]
    if len(result.tenants) > 1:
        tables.append(Table(answers.tenant_rows(result.by_tenant(slo)), answers.TENANT_HEAD, "Tenants"))
    if len(result.replicas) > 1:
        tables.append(Table(answers.replica_rows(result), answers.REPLICA_HEAD, "Replicas"))
    return tables


def _slo_text(slo: SLO | None) -> str:
    if not slo:
        return ""
    limits = [f"{name.removesuffix('_ms')} at most {value:g} ms" for name, value in vars(slo).items() if value]
    return "SLO, for each request: " + ", ".join(limits) + "."


def _request_rows(result: SimulationResult) -> Iterable[Sequence[Any]]:
    """By number, so that runs can be laid side by side."""
    yield [*_REQUEST_COLUMNS, "ttft", "tpot", "e2el"]
    table: RequestTable = result.requests
    order = table.index.argsort()
    columns = [getattr(table, name)[order].tolist() for name in (*_REQUEST_COLUMNS, "ttft", "tpot", "e2el")]
    columns[1] = [result.tenants[place] for place in columns[1]]
    for row in zip(*columns, strict=True):
        yield ["" if value != value else _rounded(value) for value in row]


def _step_rows(result: SimulationResult) -> Iterable[Sequence[Any]]:
    yield ["replica", *TIMELINE_COLUMNS]
    for number, replica in enumerate(result.replicas):
        columns = replica.timeline.columns()
        for row in zip(*(columns[name] for name in TIMELINE_COLUMNS), strict=True):
            yield [number, *(_rounded(value) for value in row)]


def _rounded(value: Any) -> Any:
    """To a microsecond; whole numbers without a point."""
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else round(value, 6)


class _Folder:
    """What was written so far, to be listed on the page."""

    def __init__(self, folder: str | Path) -> None:
        require_matplotlib()
        self.path = Path(folder).expanduser()
        self.files: dict[str, str] = {}
        self.images: list[Image] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"report: cannot make the folder {str(folder)!r}: {error}") from error

    def pictures(self, pictures: Iterable[Picture]) -> None:
        for picture in pictures:
            svg, png = picture.save(self.path / IMAGES)
            self.images.append(Image(f"{IMAGES}/{svg.name}", f"{IMAGES}/{png.name}", picture.title, picture.reading))

    def text(self, name: str, content: str, what: str) -> None:
        (self.path / name).write_text(content, encoding="utf-8")
        self.files[name] = what

    def json(self, name: str, content: Any, what: str) -> None:
        self.text(name, json.dumps(content, indent=1, default=str) + "\n", what)

    def csv(self, name: str, rows: Iterable[Sequence[Any]], what: str) -> None:
        with open(self.path / name, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.files[name] = what

    def page(self, asked: Question, answer: str, tables: Sequence[Table], config: Mapping[str, Any]) -> Path:
        settings = answers.setting_rows(config)
        page = Page(asked.title, answer, asked.command, tables, self.images, settings, self.files)
        path = self.path / "index.html"
        path.write_text(render_page(page), encoding="utf-8")
        return path

"""Pictures and report folders: what is in them, that they leave nothing behind, and that a browser shows them."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.constraints import parse_constraint
from mini_vllm.simulator.cost import TwoConstantCost
from mini_vllm.simulator.curves import find_knee
from mini_vllm.simulator.experiments import batch_stacks, budget_knee, kv_work_curve, pool_sizes, prefill_spike
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.plots import experiments as drawn_experiments
from mini_vllm.simulator.plots.runs import latency_cdfs, run_pictures, timelines
from mini_vllm.simulator.plots.style import say_ms
from mini_vllm.simulator.plots.sweeps import capacity_search, sweep_pictures, throughput_against_latency
from mini_vllm.simulator.report import Question, write_capacity_report, write_report, write_sweep_report
from mini_vllm.simulator.results import SLO
from mini_vllm.simulator.scenario import Scenario
from mini_vllm.simulator.sweep import SweepPoint, parse_axis, run_sweep
from mini_vllm.simulator.workload import TenantMix, WorkloadOptions

matplotlib = pytest.importorskip("matplotlib")

COST = TwoConstantCost(fixed_seconds=0.02, per_token_seconds=1e-4)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LIMITS = SLO(ttft_ms=500, tpot_ms=60)


@pytest.fixture(scope="module")
def scenario():
    workload = WorkloadOptions(
        num_requests=80, rate=6, prompt_len="uniform:50,400", output_len="uniform:5,30", shared_prefix_tokens=64,
        tenants=(TenantMix(name="<chat>", share=3), TenantMix(name="docs")),
    )  # fmt: skip
    return Scenario(workload, SimulationOptions(num_gpu_blocks=200, max_num_seqs=8, step_records=50), COST, slo=LIMITS)


@pytest.fixture(scope="module")
def result(scenario):
    return scenario.run()


@pytest.fixture(scope="module")
def swept(scenario):
    return run_sweep(scenario, [parse_axis("rate=1,2,4,8,16")])


# --- pictures ----------------------------------------------------------------------------------------------------


def test_each_picture_has_titles_units_and_a_sentence(result, swept):
    pictures = [*run_pictures(result, LIMITS), *sweep_pictures(swept, 500)]
    names = [picture.name for picture in pictures]
    assert names == [
        "timelines", "batch_composition", "latency_cdfs", "prefix_hits", "latency_against_rate",
        "throughput_against_latency",
    ]  # fmt: skip
    for picture in pictures:
        assert picture.title
        assert picture.reading.endswith(".")
        assert any(axis.get_xlabel() for axis in picture.figure.axes)
        assert all(axis.get_ylabel() or axis.get_title("left") for axis in picture.figure.axes)


def test_pictures_leave_no_figure_and_no_setting_behind(result, tmp_path):
    before = dict(matplotlib.rcParams)
    timelines(result).save(tmp_path)
    assert dict(matplotlib.rcParams) == before
    code = "import mini_vllm.simulator.plots.runs, mini_vllm.simulator.report, sys; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_same_picture_gives_the_same_bytes(result, tmp_path):
    first, second = latency_cdfs(result).save(tmp_path / "a"), latency_cdfs(result).save(tmp_path / "b")
    assert [path.suffix for path in first] == [".svg", ".png"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_without_matplotlib_the_error_names_the_extra(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"need matplotlib; pip install 'mini-vllm\[plots\]'"):
        timelines(result)
    with pytest.raises(ConfigError, match="matplotlib"):
        write_report(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _lines(picture, panel=0):
    return {line.get_label(): line for line in picture.figure.axes[panel].get_lines()}


def test_the_curve_of_ttft_ends_at_the_slowest_request(result):
    line = next(line for name, line in _lines(latency_cdfs(result)).items() if name.startswith("TTFT"))
    assert line.get_xdata()[-1] == pytest.approx(result.completed.ttft.max() * 1e3)
    assert line.get_ydata()[-1] == 1.0
    middle = float(np.interp(0.5, line.get_ydata(), line.get_xdata()))
    assert middle == pytest.approx(result.metrics()["median_ttft_ms"], rel=0.1)


def test_the_knee_that_is_drawn_is_the_one_that_is_found(swept):
    picture = sweep_pictures(swept)[0]
    rates = [point.values["rate"] for point in swept.points]
    tails = [point.metrics["p99_ttft_ms"] for point in swept.points]
    knee = find_knee(rates, tails)
    texts = [text.get_text() for text in picture.figure.axes[0].texts]
    assert f"knee at {knee.x:g}" in texts


def test_the_front_that_is_drawn_joins_what_no_point_beats(scenario):
    result = run_sweep(scenario, [parse_axis("max_num_seqs=1,4,8"), parse_axis("rate=2,16")])
    line = _lines(throughput_against_latency(result))["Pareto front"]
    costs, gains = list(line.get_xdata()), list(line.get_ydata())
    assert costs == sorted(costs)
    assert gains == sorted(gains)
    assert max(gains) == max(result.column("output_throughput"))


def test_experiments_are_drawn_with_their_figures():
    stacks = drawn_experiments.batch_stacks_picture(batch_stacks(), 8).figure.axes[0]
    assert [patch.get_height() for patch in stacks.containers[0]] == [8, 3, 1, 1, 1, 0]
    assert [patch.get_height() for patch in stacks.containers[1]] == [0, 5, 2, 1, 1, 1]
    spikes = drawn_experiments.prefill_spike_picture([prefill_spike(0), prefill_spike(32)])
    assert list(_lines(spikes)["whole prompts"].get_ydata())[:2] == [257, 2]
    work = drawn_experiments.kv_work_picture(kv_work_curve([10, 100]))
    assert list(_lines(work)["without a cache"].get_ydata()) == [95, 5450]
    small = WorkloadOptions(num_requests=10, rate=8, prompt_len="300", output_len="8")
    knee = drawn_experiments.budget_knee_picture(budget_knee((64, 256, 1024), small))
    assert len(next(iter(knee.figure.axes[0].get_lines())).get_xdata()) == 3
    pools = drawn_experiments.pool_sizes_picture(pool_sizes((40, 200), small))
    assert len(pools.figure.axes) == 2


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0 ms"), (0.5, "500 µs"), (12.34, "12.3 ms"), (1000, "1 s"), (12345, "12.35 s"), (2e6, "2,000 s")],
)
def test_latencies_are_said_as_people_do(ms, text):
    assert say_ms(ms) == text


# --- report folders ----------------------------------------------------------------------------------------------

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps links and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.ids: dict[str, int] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.ids[tag] = self.ids.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def report(result, tmp_path_factory):
    question = Question("A <run>", "mini-vllm simulate --rate 6 & more", {"model": "none"})
    return write_report(result, tmp_path_factory.mktemp("report") / "out", question, LIMITS)


def test_everything_the_page_links_to_is_beside_it(report):
    page = Page(report)
    assert page.ids["img"] == 4
    for link in page.links:
        assert link == "data:," or (report.parent / link).is_file(), link
    kept = {path.relative_to(report.parent).as_posix() for path in report.parent.rglob("*") if path.is_file()}
    assert kept - {"index.html"} == set(page.links) - {"data:,"}


def test_the_page_needs_nothing_from_elsewhere(report):
    text = report.read_text(encoding="utf-8")
    for word in ("http://", "https://", "<script", "@import", "url("):
        assert word not in text
    for path in (report.parent / "images").glob("*.svg"):
        assert "<script" not in path.read_text(encoding="utf-8")


def test_what_comes_from_outside_is_escaped(report):
    assert "<chat>" not in report.read_text(encoding="utf-8")
    words = " ".join(Page(report).text)
    assert "A <run>" in words
    assert "--rate 6 & more" in words
    assert "<chat>" in words


def test_the_page_says_the_figures_of_the_run(report, result):
    words = " ".join(Page(report).text)
    metrics = result.metrics(LIMITS)
    assert "80 requests in" in words
    assert f"{100 * metrics['slo_attainment']:.1f} % of the requests kept the SLO" in words
    assert f"{metrics['num_steps']:,}" in words
    assert "docs" in words


def test_the_numbers_are_all_there(report, result):
    folder = report.parent
    assert json.loads((folder / "results.json").read_text())["metrics"] == result.metrics(LIMITS)
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_num_seqs"], config["workload"]["rate"], config["model"]) == (8, 6, "none")
    rows = list(csv.DictReader((folder / "requests.csv").read_text().splitlines()))
    assert [int(row["index"]) for row in rows] == list(range(80))
    assert {row["tenant"] for row in rows} == {"<chat>", "docs"}
    assert sum(int(row["num_output_tokens"]) for row in rows) == result.metrics()["total_output_tokens"]
    assert max(float(row["ttft"]) for row in rows) == pytest.approx(result.completed.ttft.max(), abs=1e-6)
    steps = list(csv.DictReader((folder / "steps.csv").read_text().splitlines()))
    assert sum(int(row["steps"]) for row in steps) == result.metrics()["num_steps"]
    assert len(json.loads((folder / "trace.json").read_text())["traceEvents"]) > 50


def test_a_sweeps_report_marks_what_was_chosen_and_says_what_failed(swept, tmp_path):
    broken = SweepPoint({"rate": 99}, {}, "no room for <this>")
    result = type(swept)(swept.axes, (*swept.points, broken))
    page = Page(write_sweep_report(result, tmp_path, Question("Sweep"), slo=LIMITS, marked=[swept.points[2]]))
    assert page.ids["img"] == 3
    words = " ".join(page.text)
    assert "5 of 6 points ran" in words
    assert "The chosen point: rate=4." in words
    assert "Knee of p99_ttft_ms: at rate=" in words
    assert "no room for <this>" in words
    assert (tmp_path / "index.html").read_text().count('class="marked"') == 1
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 6
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 7


def test_a_capacity_report_lists_every_load(scenario, tmp_path):
    found = scenario.capacity([parse_constraint("p99_ttft_ms<=800")], lowest=1, tolerance=0.1)
    Page(write_capacity_report(found, tmp_path, Question("Capacity"), answer="so much"))
    data = json.loads((tmp_path / "capacity.json").read_text())
    assert data["capacity"] == found.load
    assert len(data["tried"]) == len(found.probes)
    axis = capacity_search(found).figure.axes[0]
    drawn = sum(len(line.get_xdata()) for line in axis.get_lines() if line.get_marker() in "oX")
    assert drawn == len(found.probes)


def test_a_folder_that_cannot_be_made_is_an_error(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="report: cannot make the folder"):
        write_report(result, tmp_path / "file" / "out")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_every_picture_and_nothing_sticks_out(report, tmp_path, width):
    probe = """<script>addEventListener("load", () => {
      const shown = [...document.images].filter(i => i.complete && i.naturalWidth > 0).length;
      const beyond = document.documentElement.scrollWidth - innerWidth;
      parent.document.title = `${innerWidth} wide, ${shown} images, ${beyond} beyond`;
    })</script></body>"""
    page = report.read_text(encoding="utf-8").replace("</body>", probe)
    # a window cannot be as narrow as a phone, a frame can
    outer = report.parent.parent / f"frame{width}.html"
    base = f'<base href="{report.parent.as_uri()}/">'
    frame = f'<iframe style="border:0" width="{width}" height="800" srcdoc="{escape(page)}"></iframe>'
    outer.write_text(f"<!doctype html><head>{base}</head><body>{frame}</body>", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=4000"]
    shown = subprocess.run([CHROMIUM, *flags, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=60)
    title = re.search("<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr
    assert re.fullmatch(rf"{width} wide, 4 images, (0|-\d+) beyond", title[1])


# --- what is hardly there ----------------------------------------------------------------------------------------

ONE = WorkloadOptions(num_requests=1, prompt_len="5", output_len="1")


@pytest.mark.parametrize(
    ("workload", "axes"),
    [
        (ONE, ["long_prefill_token_threshold=0,4", "max_num_seqs=1,2"]),
        (ONE, ["routing=round-robin,least-loaded"]),
        (ONE, ["max_num_seqs=1"]),
        (WorkloadOptions(num_requests=2, rate=1, prompt_len="5", output_len="1"), ["rate=1,2,3"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_runs_with_hardly_anything_in_them_are_drawn_too(workload, axes, tmp_path):
    scenario = Scenario(workload, SimulationOptions(), COST)
    swept = run_sweep(scenario, [parse_axis(text) for text in axes])
    for picture in [*run_pictures(scenario.run()), *sweep_pictures(swept)]:
        picture.save(tmp_path, ["svg"])

"""benchmarks/serving.py: its arithmetic, the engine that computes nothing, and (slow) the whole of a quick run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.request import Request
from mini_vllm.sampling_params import SamplingParams

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when one is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# -- arithmetic ------------------------------------------------------------------------------------------------


def test_a_token_costs_what_long_requests_cost_beyond_short_ones() -> None:
    from serving_api import Outcome, costs

    short = Outcome(seconds=1.0, cpu=0.010, tokens=10, events=10)
    long = Outcome(seconds=2.0, cpu=0.046, tokens=100, events=50)
    found = costs(short, long, num_requests=10)
    assert found["us_per_request"] == pytest.approx(1000)
    assert found["us_per_token"] == pytest.approx(400)
    assert found["tokens_per_event"] == 2 and found["cpu_share"] == pytest.approx(0.023)


def test_spread_keeps_every_repetition() -> None:
    from serving_report import shown, spread_of

    found = spread_of([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "values": [3.0, 1.0, 2.0]}
    assert shown(found) == "2.0 (1.0-3.0)" and shown(spread_of([2.0])) == "2.0" and shown(None) == "-"


def test_ratios_are_taken_repetition_by_repetition() -> None:
    from serving_model import ratios

    runs: dict[str, list[dict[str, Any]]] = {
        "process": [{"output_throughput": 100.0}, {"output_throughput": 50.0}],
        "serve": [{"output_throughput": 95.0}, {"output_throughput": 40.0}],
    }
    assert ratios(runs)["serve/process"]["output_throughput"]["values"] == [0.95, 0.8]


def test_guidellm_figures_are_those_of_successful_requests() -> None:
    from serving_model import guidellm_figures

    times = {"successful": {"percentiles": {"p50": 5.0, "p99": 9.0}}, "errored": {"percentiles": {"p50": 1.0}}}
    metrics = {
        "output_tokens_per_second": {"successful": {"mean": 12.0}},
        "time_to_first_token_ms": times,
        "inter_token_latency_ms": times,
        "request_totals": {"successful": 7, "errored": 1},
    }
    found = guidellm_figures({"benchmarks": [{"metrics": metrics}]})
    assert (found["output_throughput"], found["p50_ttft_ms"], found["p99_itl_ms"], found["completed"]) == (12, 5, 9, 7)


# -- what is sent, and what answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["completions", "chat", "responses", "messages"])
def test_a_body_that_is_not_streamed_asks_for_no_stream_options(api: str) -> None:
    from serving_api import Load, body_of

    streamed = json.loads(body_of(Load(api, 1, 1, 5), "m"))
    whole = json.loads(body_of(Load(api, 1, 1, 5, stream=False), "m"))
    assert streamed["stream"] is True and whole["stream"] is False and "stream_options" not in whole


def test_the_stub_gives_exactly_the_tokens_that_were_asked_for() -> None:
    from serving_stub import Pace, StubCore

    core = StubCore([7, 8, 9], Pace(0.0, 2))
    core.add_request(Request("a", [1], SamplingParams(max_tokens=5, logprobs=2)))
    steps = []
    while core.has_work():
        steps.append(core.step().outputs[0])
    assert [step.new_token_ids for step in steps] == [[7, 8], [9, 7], [8]]
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    assert [len(step.logprobs or ()) for step in steps] == [2, 2, 1]
    assert steps[0].times is not None and steps[1].times is None


def test_the_stub_refuses_samples_it_would_never_answer() -> None:
    from serving_stub import Pace, StubCore

    with pytest.raises(ValueError, match="samples"):
        StubCore([7], Pace()).add_request(Request("a", [1], SamplingParams(n=2, max_tokens=1), child_ids=("b",)))


def test_every_id_of_the_made_up_tokenizer_has_text(tmp_path: Path) -> None:
    from serving_model import Work, make_folder

    from mini_vllm.text.tokenizer import Tokenizer

    make_folder(tmp_path, Work.small())
    tokenizer = Tokenizer.from_folder(tmp_path)
    size = Work.small().shape["vocab_size"]
    assert tokenizer.vocab_size == size and tokenizer.eos_token_id == size - 1
    assert tokenizer.decode([300, 301]) == " w300 w301" and tokenizer.encode("ab c") != []


# -- the whole -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the CPU time of another process as Linux keeps it")
def test_quick_run_measures_every_part_and_names_no_path_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "serving.py"), "--quick", "--output", str(path)],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    parts = report["parts"]
    assert list(parts) == ["api", "rates", "layers", "model", "clients"]
    assert len(parts["api"]) == 14 and all(row["us_per_request"]["median"] > 0 for row in parts["api"])
    assert all(row["requests_per_second"]["median"] > 0 for row in parts["rates"])
    assert set(parts["model"]["sides"]) == {"process", "thread", "serve"}
    assert parts["model"]["ratios"]["serve/process"]["output_throughput"]["median"] > 0
    assert "skipped" in parts["clients"] and "--guidellm" in done.stdout
    assert str(BENCHMARKS.parent) not in path.read_text() and str(tmp_path) not in path.read_text()

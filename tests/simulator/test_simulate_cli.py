"""The command: what it prints, what it writes, and what it refuses."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.entrypoints.cli import simulate_arguments
from mini_vllm.entrypoints.cli.main import main
from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.options import ROUTINGS
from mini_vllm.simulator.workload import TenantMix

SMALL = ["simulate", "--step-ms", "10", "--token-us", "50", "--num-gpu-blocks-override", "500"]
LOAD = ["--rate", "5", "--num-requests", "40", "--prompt-len", "uniform:10,50", "--output-len", "8"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*SMALL, *LOAD, *arguments]) == 0
    return capsys.readouterr().out


def test_it_says_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--ttft-slo-ms", "50")
    assert text.startswith("40 requests in ")
    for word in ("TTFT", "ITL", "requests per second", "preemptions", "SLO"):
        assert word in text


def test_json_on_standard_output_is_all_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--json", "-", "--ttft-slo-ms", "50"))
    assert found["metrics"]["completed"] == 40
    assert found["metrics"]["slo_attainment"] <= 1
    assert found["description"]["workload"]["rate"] == 5.0
    assert found["options"]["num_gpu_blocks"] == 500
    assert len(found["timelines"]) == 1


def test_csv_is_one_line_of_figures(capsys: pytest.CaptureFixture[str]) -> None:
    head, line = csv.reader(io.StringIO(run(capsys, "--csv", "-")))
    assert dict(zip(head, line, strict=True))["completed"] == "40"


def test_the_same_seed_gives_the_same_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--json", "-") == run(capsys, "--json", "-") != run(capsys, "--json", "-", "--seed", "1")


def test_a_chrome_trace_has_a_process_for_each_replica(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run(capsys, "--chrome-trace", str(path), "--num-replicas", "2", "--chrome-trace-steps", "20")
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert {event["pid"] for event in events} == {1, 2}
    steps = [event for event in events if event["name"].startswith("step ")]
    assert len(steps) == 40 and min(event["ts"] for event in steps) == 0


def test_a_model_on_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--preset", "llama-3-8b", "--gpu", "a100-80g", "--rate", "4", "--num-requests", "20"]
    assert main([*arguments, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["num_gpu_blocks"] == 28816
    assert found["description"]["cost"]["hardware"] == "a100-80g"
    assert 5 < found["metrics"]["median_tpot_ms"] < 15


def test_a_sweep_is_a_line_for_each_point(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--sweep", "rate=2,20", "--sweep", "max_num_seqs=1,8", "--csv", "-")
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(line["rate"], line["max_num_seqs"]) for line in lines] == [
        ("2", "1"),
        ("2", "8"),
        ("20", "1"),
        ("20", "8"),
    ]


def test_the_best_point_of_a_sweep_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--sweep", "rate=2,4,200", "--maximise", "output_throughput", "--limit", "p99_ttft_ms<=30")
    starred = [line for line in text.splitlines() if line.endswith("*")]
    assert len(starred) == 1 and starred[0].split()[0] == "4"


def test_a_capacity_search_finds_the_largest_rate(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--capacity", "rate", "--max-num-seqs", "2", "--ttft-slo-ms", "300")
    assert text.startswith("rate ") and "keeps p99_ttft_ms<=300; broken at" in text


def test_fragmentation_compares_three_caches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "fragmentation", "--num-sequences", "40", "--json", "-"]) == 0
    assert set(json.loads(capsys.readouterr().out)["modes"]) == {"naive", "paged", "shared"}


def test_a_report_folder_has_its_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(capsys, "--report", str(tmp_path / "out"))
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "-1"], "rate: must be above 0"),
        (["--prompt-len", "trace:nowhere.jsonl"], "nowhere.jsonl"),
        (["--trace", "x.jsonl"], "rate: has no meaning when a trace is replayed"),
        (["--cost-model", "roofline"], "no meaning with the cost model 'roofline'"),
        (["--cost-file", "x.json"], "step_ms, token_us: no meaning with the cost model 'fitted'"),
        (["--limit", "p99_ttft_ms<=1"], "only have a meaning with sweep or capacity"),
        (["--sweep", "rate=1,2", "--capacity", "rate"], "give one of the two"),
        (["--sweep", "colour=1,2"], "nothing is called 'colour'"),
        (["--capacity", "rate", "--limit", "p99_ttft_ms<=1"], "p99_ttft_ms"),
        (["--tenant", "a,size=3"], "tenant: 'size=3' must be one of"),
        (["--ttft-slo-ms", "0"], "slo ttft_ms: must be above 0"),
        (["--max-model-len", "40"], "max_model_len: request"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *LOAD, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]


def test_a_fitted_cost_needs_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--rate", "1", "--cost-model", "fitted"]) == 2
    assert "cost_file: the cost model 'fitted' needs the file" in capsys.readouterr().err


def test_no_room_for_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--preset", "llama-3-70b", "--gpu", "l4", "--rate", "1"]) == 2
    assert "no room for a KV cache on l4" in capsys.readouterr().err


def test_flags_name_the_routings_there_are() -> None:
    assert simulate_arguments.ROUTINGS == ROUTINGS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", TenantMix(name="a")),
        ("b,share=2,prompt_len=uniform:1;9,users=3", TenantMix(name="b", share=2.0, prompt_len="uniform:1,9", users=3)),
    ],
)
def test_a_tenant_in_words(text: str, expected: Any) -> None:
    assert simulate_arguments.parse_tenant(text) == expected


def test_a_tenant_without_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="'x' is no number"):
        simulate_arguments.parse_tenant("a,share=x")

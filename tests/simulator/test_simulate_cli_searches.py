"""The command's sweeps and searches: flags that need each other, what is checked first, and what the reports say."""

import json
from pathlib import Path

import pytest

from mini_vllm.entrypoints.cli.main import main
from mini_vllm.simulator import scenario

BASE = [
    "simulate", "--step-ms", "10", "--token-us", "50", "--num-gpu-blocks-override", "500", "--rate", "5",
    "--num-requests", "40", "--prompt-len", "uniform:10,50", "--output-len", "8",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "0.1"], "tolerance: only have a meaning with capacity"),
        (["--sweep", "rate=1,2", "--lowest", "1"], "only have a meaning with capacity"),
        (["--capacity", "rate", "--limit", "p99_ttft_ms<=900", "--lowest", "0"], "lowest: must be above 0, got 0"),
        (["--capacity", "rate", "--limit", "p99_ttft_ms<=900", "--tolerance", "0"], "tolerance: must be between 0 and"),
        (["--capacity", "rate", "--limit", "p99_ttft_ms<=900", "--lowest", "4", "--highest", "2"], "highest: must be"),
        (["--capacity", "rate"], "needs at least one limit"),
        (["--sweep", "rate=1,2", "--limit", "p99_ttft_ms<=900"], "needs --maximise or --minimise"),
        (["--sweep", "rate=1,2", "--processes", "-1"], "processes: must be at least 1, got -1"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_runs(arguments, message, capsys, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it ran")

    monkeypatch.setattr(scenario, "simulate", never)
    assert main([*BASE, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_axis_is_an_error_before_anything_runs(capsys, monkeypatch):
    monkeypatch.setattr(scenario.Scenario, "__call__", None)
    assert main([*BASE, "--sweep", "rate=1,2", "--sweep", "sets=1,2"]) == 2
    assert "nothing is called 'sets'" in capsys.readouterr().err


def test_a_sweep_says_its_knee_and_where_the_slo_breaks_and_reports_both(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    rates = "rate=2,4,8,16,32,64,128"
    arguments = ["--max-num-seqs", "2", "--sweep", rates, "--ttft-slo-ms", "100", "--processes", "1"]
    assert main([*BASE, *arguments, "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "knee of p99_ttft_ms: at rate=" in out
    assert "99 % keep the SLO: from rate=" in out
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Knee of p99_ttft_ms: at rate=" in page
    for name in ("latency_against_rate", "throughput_against_latency", "slo_attainment"):
        assert f"images/{name}.svg" in page
        assert (tmp_path / "images" / f"{name}.png").stat().st_size > 5000


def test_a_capacity_search_stays_within_its_range_and_reports_every_load(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    found = tmp_path / "found.json"
    arguments = ["--capacity", "rate", "--limit", "p99_ttft_ms<=100", "--max-num-seqs", "2", "--lowest", "2",
                 "--highest", "64", "--tolerance", "0.1"]  # fmt: skip
    assert main([*BASE, *arguments, "--json", str(found), "--report", str(tmp_path / "out")]) == 0
    data = json.loads(found.read_text())
    loads = [probe["load"] for probe in data["tried"]]
    assert min(loads) >= 2 and max(loads) <= 64
    assert data["broken_at"] - data["capacity"] <= 0.1 * data["broken_at"]
    assert data["metrics"]["p99_ttft_ms"] <= 100
    assert json.loads(Path(tmp_path / "out" / "capacity.json").read_text()) == data

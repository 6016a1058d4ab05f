"""benchmarks/simulator_fidelity.py: its arithmetic, its loop on a real engine, and (slow) the whole of a quick run."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name, as they do when one is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_an_error_is_of_the_median_and_the_spread_is_between_the_real_runs() -> None:
    from fidelity_report import FIGURES, compare, summary

    real = [dict.fromkeys(FIGURES, 9.0), dict.fromkeys(FIGURES, 11.0)]
    found = compare(real, dict.fromkeys(FIGURES, 12.0))
    assert list(found) == list(FIGURES)
    assert found["p99_ttft_ms"] == pytest.approx(
        {"real": 10.0, "spread_percent": 20.0, "simulated": 12.0, "error_percent": 20.0}
    )
    rows = [{"name": "a load", "compared": found}]
    assert "+20.0 (20.0)" in summary(rows) and "a load" not in summary(rows, "same_speed_error_percent")
    slowed = compare(real, real[0], [dict.fromkeys(FIGURES, value) for value in (9.9, 11.0)])
    assert slowed["p99_ttft_ms"]["same_speed_error_percent"] == pytest.approx(5.0), "of 10 % and none"


def test_the_cost_is_compared_with_the_steps_that_were_taken() -> None:
    from fidelity_report import step_error

    from mini_vllm.simulator.fitted import FittedCost

    notes: Any = [SimpleNamespace(chunks=[(4, 1)], sampled_rows=1, seconds=s) for s in (1.0, 2.0, 5.0)]
    found = step_error(FittedCost(((1, 2.0),)), notes)
    assert found == pytest.approx({"total_error_percent": -25.0, "median_error_percent": 0.0})


def test_a_workload_that_is_not_what_it_is_called_is_doubted() -> None:
    from fidelity_report import doubts

    def row(load: float, pool: float | None = None, shared: float = 0.0, **run: float) -> dict[str, Any]:
        runs = [{"num_preemptions": 3, "prefix_hit_rate": 0.5, "request_throughput": 4.0} | run] * 2
        return {"load": load, "rate": 5.0, "shape": {"pool": pool, "shared": shared}, "runs": runs}

    assert not doubts(row(1.3, pool=0.3, shared=0.25))
    assert not doubts(row(0.4, num_preemptions=0, prefix_hit_rate=0.0, request_throughput=5.0))
    (found,) = doubts(row(0.9, pool=0.3, num_preemptions=0))
    assert "nobody was preempted" in found
    (found,) = doubts(row(0.6, shared=0.25, prefix_hit_rate=0.0))
    assert "no prefix" in found
    (found,) = doubts(row(1.3, request_throughput=5.0))
    assert "kept up: 5.00 requests/s of 5.00" in found


def test_both_sides_are_given_the_same_requests() -> None:
    from fidelity_requests import SHAPES, Listed, make_requests

    for shape in SHAPES:
        requests = make_requests(shape, 30, 5.0, 1024, range(100), seed=1)
        assert requests == make_requests(shape, 30, 5.0, 1024, range(100), seed=1)
        source = Listed(requests).start()
        for timed in requests:
            assert source.next_time() == timed.arrival
            sim = source.pop()
            assert (sim.prompt_token_ids(), sim.output_len) == (timed.prompt, timed.output_len)
            assert sim.token_id >= 100 and timed.output_len >= 2
        assert source.next_time() == float("inf")
        assert requests[-1].arrival == pytest.approx(29 / 5)
        assert len(requests[0].prompt) + requests[0].output_len <= 1024
    shared = make_requests(SHAPES[2], 30, None, 1024, range(100), seed=1)
    assert len({tuple(timed.prompt[:256]) for timed in shared}) == 4 and {timed.arrival for timed in shared} == {0.0}


def test_a_small_pool_holds_any_request_but_not_a_full_batch() -> None:
    from fidelity_requests import SHAPES, small_pool

    from mini_vllm.simulator.options import SimulationOptions

    shape = SHAPES[3]
    assert small_pool(shape, SimulationOptions(max_num_seqs=1), 1024) == 65
    # a sixteenth of 256 x ((16 + 256) / 2 + (64 + 128) / 2) tokens, and the null block
    assert small_pool(shape, SimulationOptions(max_num_seqs=256), 1024) == 233


def test_at_load_the_small_pool_preempts_and_shared_prefixes_are_found() -> None:
    """What the names promise, by the simulator: a machine of about 5 ms a step, eight seconds of arrivals."""
    from fidelity_requests import SHAPES, Listed, make_requests, small_pool

    from mini_vllm.simulator.cost import TwoConstantCost
    from mini_vllm.simulator.driver import simulate
    from mini_vllm.simulator.options import SimulationOptions

    def figures(number: int, rate: float, num_blocks: int) -> dict[str, Any]:
        requests = make_requests(SHAPES[number], round(8 * rate), rate, 1024, range(100), seed=0)
        options = SimulationOptions(num_gpu_blocks=num_blocks, max_num_seqs=64, max_model_len=1024)
        return simulate(options, Listed(requests), TwoConstantCost(0.004, 0.0002)).metrics()

    pool = small_pool(SHAPES[3], SimulationOptions(max_num_seqs=64), 1024)
    assert figures(3, 6.5, pool)["num_preemptions"] > 0
    assert figures(3, 6.5, 5000)["num_preemptions"] == 0, "it is the pool"
    assert figures(2, 6.5, 5000)["token_prefix_hit_rate"] > 0.5
    assert figures(0, 6.5, 5000)["token_prefix_hit_rate"] == 0


def test_requests_are_added_when_due_and_served_to_their_end() -> None:
    from fidelity_engine import engine_of, options_of, serve
    from fidelity_requests import Listed, Timed

    from mini_vllm.simulator.cost import TwoConstantCost
    from mini_vllm.simulator.driver import simulate

    requests = [Timed(0.0, [5] * 20, 4), Timed(0.0, [6] * 9, 3), Timed(0.15, [5] * 20, 4)]
    args = argparse.Namespace(model=None, threads=1, max_num_seqs=4, max_model_len=64)
    with engine_of(args, 40) as engine:
        options = options_of(engine)
        assert (options.num_gpu_blocks, options.max_model_len, options.max_num_seqs) == (40, 64, 4)
        for _ in range(2):  # the second finds nothing of the first
            real = serve(engine, requests)
            assert [t.num_output_tokens for t in real.timelines] == [4, 3, 4]
            assert all(t.ttft > 0 for t in real.timelines)
            assert real.probes and 0 <= real.probes[0][0] < real.duration
            assert real.duration >= 0.15 and all(note.seconds > 0 for note in real.notes)
            metrics = real.metrics()
            simulated = simulate(options, Listed(requests), TwoConstantCost(1e-3, 0.0)).metrics()
            for name in ("completed", "total_input_tokens", "total_output_tokens"):
                assert metrics[name] == simulated[name]
            assert real.prefix_cache_hits == 16
            assert real.timelines[2].arrival - real.timelines[0].arrival == pytest.approx(0.15)


def test_probes_explain_steps_that_slow_as_they_do() -> None:
    """A machine that is half as fast every other second; the engine's steps slow by the square root of that."""
    from fidelity_weather import Weather, fit_climate

    times = [0.02 * place for place in range(1000)]
    probes = [(when, 1e-4 * (2.0 if int(when) % 2 else 1.0)) for when in times]
    steps = [(when, 0.01 * (2.0**0.5 if int(when) % 2 else 1.0)) for when in times]
    climate = fit_climate(probes, [steps])
    assert climate.calm_seconds == pytest.approx(1e-4)
    assert climate.exponent == pytest.approx(0.5) and climate.left[1] < 1e-6 < climate.left[0]
    weather = Weather.of(probes, climate)
    assert [weather.at(when) for when in (0.5, 1.5, 2.5, 99.0)] == pytest.approx([1.0, 2.0**0.5, 1.0, 2.0**0.5])
    steady = fit_climate([(when, 1e-4) for when in times], [steps])
    assert steady.exponent == 1.0, "probes that do not vary teach nothing"


def test_a_simulated_run_is_slowed_as_the_machine_was() -> None:
    from fidelity_requests import Listed, Timed
    from fidelity_weather import Weather, expose

    from mini_vllm.simulator.driver import Simulation
    from mini_vllm.simulator.fitted import FittedCost
    from mini_vllm.simulator.options import SimulationOptions

    requests, cost = [Timed(0.0, [5] * 20, 5)], FittedCost(((1, 1.0),), slowdown=1.3)
    found = []
    for weather in (None, Weather([0.0, 1.9, 2.0], [1.0, 1.0, 3.0])):
        simulation = Simulation(SimulationOptions(num_gpu_blocks=50), Listed(requests), cost)
        if weather is not None:
            expose(simulation, weather)
        found.append(simulation.run().duration)
    assert found == pytest.approx([5 * 1.3, 2 * 1.0 + 3 * 3.0])


def test_what_http_adds_is_what_is_not_predicted() -> None:
    from fidelity_server import outside_seconds

    assert outside_seconds([0.011, 0.012, 0.050], [0.010, 0.010, 0.010]) == pytest.approx(0.002)
    assert outside_seconds([0.009], [0.010]) == 0.0


@pytest.mark.slow
def test_quick_run_compares_every_workload_and_names_no_path_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "simulator_fidelity.py"), "--quick", "--output", str(path)],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["workloads"]}
    assert len(rows) == 13 and "mixed, load 1.3" in rows and "server, mixed, load 0.8" in rows
    assert report["calibration"]["quality"]["num_steps"] > 30
    for row in rows.values():
        assert all(found["real"] > 0 and found["simulated"] > 0 for found in row["compared"].values())
        assert all(run["completed"] == row["num_requests"] == row["simulated"]["completed"] for run in row["runs"])
        assert ("same_speed_error_percent" in row["compared"]["median_ttft_ms"]) == (
            not row["name"].startswith("server")
        )
    assert rows["small pool, at once"]["runs"][0]["num_preemptions"] > 0
    assert rows["small pool, at once"]["simulated"]["num_preemptions"] > 0
    for name in ("shared prefixes, at once", "shared prefixes, load 0.6"):
        assert rows[name]["simulated"]["prefix_cache_hits"] > 0
        assert all(run["prefix_hit_rate"] > 0 for run in rows[name]["runs"])
    assert all(row["doubts"] == [] or row["load"] is not None for row in rows.values())
    assert str(BENCHMARKS.parent) not in path.read_text() and str(tmp_path) not in path.read_text()

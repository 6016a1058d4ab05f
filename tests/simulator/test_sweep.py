"""Sweeps over a scenario: grids, values by name, processes, and the figures they find."""

import csv
import io
import json
import multiprocessing

import pytest

from mini_vllm.exceptions import ConfigError
from mini_vllm.simulator.constraints import parse_constraint
from mini_vllm.simulator.cost import RooflineCost, TwoConstantCost
from mini_vllm.simulator.options import SimulationOptions
from mini_vllm.simulator.planner.hardware import hardware_preset
from mini_vllm.simulator.planner.options import PlanOptions
from mini_vllm.simulator.planner.presets import preset_geometry
from mini_vllm.simulator.planner.setup import Setup
from mini_vllm.simulator.results import SLO
from mini_vllm.simulator.scenario import Scenario, slo_limits
from mini_vllm.simulator.sweep import Axis, grid, parse_axis, run_sweep
from mini_vllm.simulator.sweep_render import sweep_csv, sweep_json, sweep_table
from mini_vllm.simulator.workload import WorkloadOptions

COST = TwoConstantCost(fixed_seconds=0.02, per_token_seconds=1e-4)


@pytest.fixture
def scenario():
    workload = WorkloadOptions(num_requests=60, rate=2, prompt_len="uniform:50,400", output_len="20")
    return Scenario(workload, SimulationOptions(num_gpu_blocks=2000, max_num_seqs=16), COST)


def by_planner(**options):
    setup = Setup(preset_geometry("llama-3-8b"), hardware_preset("a100-80g"), PlanOptions(**options))
    return Scenario(WorkloadOptions(num_requests=5, rate=1), setup=setup)


# --- axes --------------------------------------------------------------------------------------------------------


def test_an_axis_is_read_with_the_kinds_of_its_values():
    assert parse_axis("rate=1,2.5,4e1") == Axis("rate", (1, 2.5, 40.0))
    assert parse_axis("--max-num-seqs=16,64") == Axis("max_num_seqs", (16, 64))
    assert parse_axis("enable_prefix_caching=true,False") == Axis("enable_prefix_caching", (True, False))
    assert parse_axis("prompt_len=uniform:1,9;512") == Axis("prompt_len", ("uniform:1,9", 512))


@pytest.mark.parametrize("text", ["rate", "rate=", "rate=1,,2", "=1", "a b=1", "rate=1,1"])
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(ConfigError, match="sweep"):
        parse_axis(text)


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
    points = grid([Axis("a", (1, 2)), Axis("b", ("x", "y"))])
    assert points == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


def test_grids_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match="at least one axis"):
        grid([])
    with pytest.raises(ConfigError, match="twice"):
        grid([Axis("a", (1,)), Axis("a", (2,))])
    with pytest.raises(ConfigError, match=r"200 x 200 = 40,000 points, more than 10,000"):
        grid([Axis("a", tuple(range(200))), Axis("b", tuple(range(200)))])


# --- values by name ----------------------------------------------------------------------------------------------


def test_each_name_changes_the_part_that_has_it(scenario):
    changed = scenario.with_values(
        {"rate": 8, "max_num_seqs": 4, "replicas": 2, "prompt_len": 100, "ttft_ms": 500, "block_size": 32}
    )
    assert changed.workload.rate == 8.0
    assert changed.workload.prompt_len == "100"
    assert changed.workload.num_requests == 60
    assert (changed.options.max_num_seqs, changed.options.num_replicas, changed.options.block_size) == (4, 2, 32)
    assert changed.slo == SLO(ttft_ms=500)
    assert scenario.workload.rate == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rat": 1}, "nothing is called 'rat'; it can be .*rate"),
        ({"max_num_seqs": 1.5}, "max_num_seqs: must be int, got 1.5"),
        ({"max_num_seqs": "many"}, "max_num_seqs: must be int, got 'many'"),
        ({"rate": True}, "rate: must be float, got True"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching: must be bool, got 1"),
        ({"rate": -1}, "rate: must be above 0"),
        ({"gpu": "h100"}, "gpu: only has a meaning where memory and cost come from the planner"),
        ({"tensor_parallel_size": 2}, "nothing is called 'tensor_parallel_size'"),
    ],
)
def test_values_that_do_not_fit_are_refused(scenario, values, message):
    with pytest.raises(ConfigError, match=message):
        scenario.with_values(values)


def test_names_can_be_checked_before_anything_runs(scenario):
    scenario.check_names(["rate", "num_users", "replicas", "block_size"])
    for name in ("rat", "step_records"):
        with pytest.raises(ConfigError, match=f"nothing is called '{name}'"):
            scenario.check_names(["rate", name])


def test_a_scenario_without_any_cost_is_refused():
    with pytest.raises(ConfigError, match="needs a cost model"):
        Scenario(WorkloadOptions(rate=1))


def test_with_the_planner_the_pool_and_the_cost_follow_the_arguments():
    base = by_planner(max_model_len=8192)
    assert isinstance(base.cost_model, RooflineCost)
    more = base.with_values({"gpu_memory_utilization": 0.95})
    split = base.with_values({"tensor_parallel_size": 2})
    fixed = base.with_values({"num_gpu_blocks": 1000, "max_num_seqs": 7})
    assert more.engine_options.num_gpu_blocks > base.engine_options.num_gpu_blocks
    assert split.engine_options.num_gpu_blocks > 2 * base.engine_options.num_gpu_blocks
    assert (fixed.engine_options.num_gpu_blocks, fixed.engine_options.max_num_seqs) == (1000, 7)
    faster = base.with_values({"gpu": "h100"})
    assert faster({})["duration"] < base({})["duration"]


# --- running -----------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_run_of_each_point(scenario):
    result = run_sweep(scenario, [parse_axis("rate=2,8"), parse_axis("max_num_seqs=1,16")])
    assert [dict(point.values) for point in result.points] == grid(result.axes)
    for point in result.points:
        assert point.metrics == scenario.with_values(point.values).run().metrics()


def test_more_load_waits_longer_and_more_seats_wait_less(scenario):
    result = run_sweep(scenario, [parse_axis("max_num_seqs=1,16"), parse_axis("rate=1,4,16")])
    for seats in (1, 16):
        waits = [p.metrics["p99_ttft_ms"] for p in result.along("rate", {"max_num_seqs": seats})]
        assert waits == sorted(waits)
    narrow, wide = (result.along("rate", {"max_num_seqs": seats})[-1] for seats in (1, 16))
    assert narrow.metrics["p99_ttft_ms"] > 2 * wide.metrics["p99_ttft_ms"]


def test_several_processes_find_what_one_does(scenario):
    axes = [parse_axis("rate=1,4,16"), parse_axis("max_num_seqs=2,16")]
    seen = []
    several = run_sweep(scenario, axes, processes=2, progress=lambda point: seen.append(point.name))
    assert several == run_sweep(scenario, axes)
    assert sorted(seen) == sorted(point.name for point in several.points)
    assert not multiprocessing.active_children()


def test_a_point_that_cannot_be_keeps_its_reason(scenario):
    result = run_sweep(scenario, [parse_axis("num_gpu_blocks=10,2000")])
    failed, done = result.points
    assert "needs" in failed.error and "9" in failed.error
    assert not failed.metrics
    assert done.metrics["completed"] == 60
    assert result.done == (done,)
    assert failed.error in sweep_table(result)


def test_when_no_point_can_be_the_sweep_is_an_error(scenario):
    with pytest.raises(ConfigError, match=r"none of 2 points can be; num_gpu_blocks=5: .*whole pool has 4"):
        run_sweep(scenario, [parse_axis("num_gpu_blocks=5,6")])


def test_errors_of_the_program_itself_are_not_swallowed():
    def attempt(values):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_sweep(attempt, [Axis("a", (1,))])


def test_processes_must_be_positive(scenario):
    with pytest.raises(ConfigError, match="processes: must be at least 1, got 0"):
        run_sweep(scenario, [parse_axis("rate=1")], processes=0)


def test_the_best_setting_within_a_limit_and_an_error_when_there_is_none(scenario):
    result = run_sweep(scenario, [parse_axis("rate=1,4,16"), parse_axis("max_num_seqs=1,16")])
    limits = [parse_constraint("p99_ttft_ms<=1000")]
    best = result.best(limits, maximise="output_throughput")
    within = [p for p in result.points if p.metrics["p99_ttft_ms"] <= 1000]
    assert best.metrics["output_throughput"] == max(p.metrics["output_throughput"] for p in within)
    with pytest.raises(ConfigError, match="none of 6 runs keeps p99_ttft_ms<=1; the nearest is rate=1"):
        result.best([parse_constraint("p99_ttft_ms<=1")], maximise="output_throughput")


# --- capacity ----------------------------------------------------------------------------------------------------


def test_capacity_of_a_machine_worked_out_by_hand():
    # one request at a time, each 10 steps of 0.1 s: one request per second, whatever the pattern of arrivals. At a
    # fixed rate below that nobody ever waits, and above it the last of 100 waits for 99 times the difference
    workload = WorkloadOptions(num_requests=100, arrivals="fixed", rate=1, prompt_len="10", output_len="10")
    machine = Scenario(workload, SimulationOptions(max_num_seqs=1), TwoConstantCost(0.1, 0.0))
    found = machine.capacity([parse_constraint("p99_queue_ms<=1")], lowest=0.1, tolerance=0.005)
    assert found.load == pytest.approx(1.0, rel=0.01)
    assert found.monotone


def test_users_are_whole_and_found_under_the_slo():
    # u users without pause share steps of 0.1 s that cost 1 ms a token more: TPOT is 0.1 + 0.001 u
    workload = WorkloadOptions(num_requests=64, users=1, prompt_len="1", output_len="20")
    machine = Scenario(workload, SimulationOptions(), TwoConstantCost(0.1, 1e-3), slo=SLO(tpot_ms=110.5))
    found = machine.capacity(slo_limits(machine.slo), "users", lowest=1, highest=64)
    assert found.load == 10
    assert found.broken_at == 11


def test_an_slo_that_cannot_be_met_is_an_error_with_the_figures(scenario):
    with pytest.raises(ConfigError, match=r"smallest load, 0\.1, .*median_ttft_ms .* is not <= 1 "):
        scenario.capacity([parse_constraint("median_ttft_ms<=1")])
    with pytest.raises(ConfigError, match="needs at least one limit"):
        scenario.capacity([])


# --- as text -----------------------------------------------------------------------------------------------------


def test_json_and_csv_hold_every_figure_of_every_point(scenario):
    result = run_sweep(scenario, [parse_axis("num_gpu_blocks=10,2000")])
    data = json.loads(sweep_json(result))
    assert data["axes"] == {"num_gpu_blocks": [10, 2000]}
    assert data["points"][1]["metrics"] == dict(result.points[1].metrics)
    rows = list(csv.DictReader(io.StringIO(sweep_csv(result))))
    assert [row["num_gpu_blocks"] for row in rows] == ["10", "2000"]
    assert rows[0]["error"] == result.points[0].error
    for name, value in result.points[1].metrics.items():
        assert rows[1][name] == ("" if value is None else str(value))


def test_the_table_has_a_row_a_point_and_marks_the_chosen(scenario):
    result = run_sweep(scenario, [parse_axis("rate=1,4")])
    lines = sweep_table(result, marked=[result.points[1]]).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:2] == ["rate", "req/s"]
    assert [line.endswith("*") for line in lines] == [False, False, True]


def test_knees_are_said_for_every_series_that_has_one(scenario):
    result = run_sweep(scenario, [parse_axis("max_num_seqs=1,16"), parse_axis("rate=0.5,1,2,4,8")])
    said = result.knees()
    assert len(said) == 2
    assert said[0].startswith("knee of p99_ttft_ms with max_num_seqs=1: at rate=")
    assert run_sweep(scenario, [parse_axis("rate=1,4")]).knees() == []


def test_a_column_nobody_has_is_an_error(scenario):
    result = run_sweep(scenario, [parse_axis("rate=1,4")])
    assert result.column("rate") == [1, 4]
    with pytest.raises(ConfigError, match="no figure is called 'speed'"):
        result.column("speed")


def test_where_the_slo_breaks_is_said_only_when_there_is_one(scenario):
    axes = [parse_axis("rate=1,4,64")]
    assert run_sweep(scenario, axes).attainments() == []
    strict = run_sweep(scenario.with_values({"ttft_ms": 200}), axes)
    shares = [point.metrics["slo_attainment"] for point in strict.points]
    assert shares[0] == 1.0 > shares[2]
    broken = next(point for point, share in zip(strict.points, shares, strict=True) if share < 0.99)
    assert strict.attainments() == [f"99 % keep the SLO: from rate={broken.values['rate']} on not"]
    loose = run_sweep(scenario.with_values({"ttft_ms": 1e6}), axes)
    assert loose.attainments() == ["99 % keep the SLO: still at rate=64"]

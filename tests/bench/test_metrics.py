"""Latency figures from time stamps: definitions, percentiles, spread."""

import pytest

from mini_vllm.bench.metrics import (
    RequestTimeline,
    distribution_ms,
    median_and_spread,
    percentiles,
    request_metrics,
)


def timeline(request_id: str = "a", arrival: float = 10.0, times: tuple[float, ...] = (), **changes: object):
    line = RequestTimeline(request_id, 5, arrival, list(times), [1] * len(times), "length")
    for name, value in changes.items():
        setattr(line, name, value)
    return line


def test_ttft_tpot_itl_and_e2el_are_measured_from_arrival() -> None:
    line = timeline(times=(10.5, 10.7, 11.5))
    assert line.ttft == pytest.approx(0.5)
    assert line.itl == pytest.approx([0.2, 0.8])
    assert line.e2el == pytest.approx(1.5)
    assert line.tpot == pytest.approx((1.5 - 0.5) / 2)


def test_an_output_of_several_tokens_is_one_gap_but_counts_all_its_tokens_in_tpot() -> None:
    line = timeline(times=(11.0, 12.0), output_counts=[1, 4])
    assert line.itl == pytest.approx([1.0])
    assert line.num_output_tokens == 5
    assert line.tpot == pytest.approx(1.0 / 4)


def test_a_single_token_has_no_tpot_and_no_itl() -> None:
    line = timeline(times=(11.0,))
    assert line.tpot is None and line.itl == []
    metrics = request_metrics([line], 1.0)
    assert metrics["mean_tpot_ms"] is None and metrics["p99_itl_ms"] is None
    assert metrics["mean_ttft_ms"] == pytest.approx(1000.0)


def test_percentiles_interpolate_between_neighbours() -> None:
    assert percentiles([1.0, 2.0, 3.0, 4.0], (0, 50, 100)) == {"0": 1.0, "50": 2.5, "100": 4.0}
    assert percentiles([1.0, 2.0], (90,))["90"] == pytest.approx(1.9)


def test_a_distribution_has_the_names_and_units_of_benchmark_files() -> None:
    figures = distribution_ms("itl", [0.001, 0.003])
    assert figures["mean_itl_ms"] == pytest.approx(2.0)
    assert figures["std_itl_ms"] == pytest.approx(1.0)  # of the population, not of a sample
    assert set(figures) == {f"{label}_itl_ms" for label in ("mean", "median", "std", "p50", "p90", "p99")}


def test_failed_requests_are_counted_apart_and_lend_no_figures() -> None:
    good = timeline(times=(10.5, 11.0))
    bad = timeline("b", times=(99.0,), finish_reason="error", error="no row")
    silent = timeline("c", times=(), finish_reason="length")
    metrics = request_metrics([good, bad, silent], 2.0)
    assert (metrics["completed"], metrics["failed"]) == (1, 2)
    assert (metrics["total_input_tokens"], metrics["total_output_tokens"]) == (5, 2)
    assert metrics["total_token_throughput"] == pytest.approx(3.5)
    assert metrics["request_throughput"] == pytest.approx(0.5)
    assert metrics["mean_e2el_ms"] == pytest.approx(1000.0)


def test_median_and_spread_cover_every_number_and_nothing_else() -> None:
    runs = [
        {"x": 3.0, "n": 2, "unknown": None, "half": None, "name": "a", "flag": True},
        {"x": 1.0, "n": 2, "unknown": None, "half": 4.0, "name": "b", "flag": True},
        {"x": 2.5, "n": 2, "unknown": None, "half": None, "name": "c", "flag": True},
    ]
    medians, spread = median_and_spread(runs)
    assert medians == {"x": 2.5, "n": 2, "unknown": None, "half": 4.0}
    assert isinstance(medians["n"], int)
    assert spread == {"x": [1.0, 3.0], "n": [2, 2], "half": [4.0, 4.0]}

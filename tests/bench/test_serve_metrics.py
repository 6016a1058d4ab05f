"""Claims about the figures of `bench serve`: each is checked against numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from mini_vllm.bench.metrics import RequestTimeline
from mini_vllm.bench.noise import NoiseReport
from mini_vllm.bench.serve.backends import Piece, StreamReading
from mini_vllm.bench.serve.metrics import (
    RequestRecord,
    distribution,
    is_good,
    peak_concurrency,
    peak_tokens_per_second,
    serve_metrics,
)
from mini_vllm.bench.serve.options import ServeOptions
from mini_vllm.bench.serve.report import render
from mini_vllm.bench.serve.result import build_result, with_details
from mini_vllm.bench.serve.schedule import arrival_offsets, rates_of

QUIET = NoiseReport(1.0, 0.0, 0.0, 0.0)


def timeline(sent: float, *outputs: float, counts: list[int] | None = None, prompt: int = 10) -> RequestTimeline:
    return RequestTimeline("r", prompt, sent, list(outputs), counts or [1] * len(outputs), "length")


def record(line: RequestTimeline, due: float | None = None) -> RequestRecord:
    return RequestRecord(line, line.arrival if due is None else due)


def failed(error: str = "HTTP 503: full") -> RequestRecord:
    return RequestRecord(RequestTimeline("f", 10, 0.0, error=error), 0.0)


# --- the figures ------------------------------------------------------------------------------------------


def test_the_figures_of_two_requests_are_those_worked_out_by_hand() -> None:
    """A: sent 0, tokens at 0.1 0.2 0.4; B: sent 0.5, tokens at 1.0 1.1. Two seconds, 20 tokens in, 5 out."""
    records = [record(timeline(0.0, 0.1, 0.2, 0.4)), record(timeline(0.5, 1.0, 1.1)), failed()]
    got = serve_metrics(records, 2.0, latencies=["ttft", "tpot", "itl", "e2el"], ranks=[50, 99], goodput={"ttft": 200})
    assert (got["completed"], got["failed"]) == (2, 1)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (20, 5)
    assert (got["request_throughput"], got["output_throughput"], got["total_token_throughput"]) == (1.0, 2.5, 12.5)
    assert got["request_goodput"] == 0.5  # only A kept 200 ms to the first token
    # TTFT 100 and 500 ms; E2EL 400 and 600; TPOT 300/2 and 100/1; gaps 100 200 100
    assert got["mean_ttft_ms"] == pytest.approx(300) and got["std_ttft_ms"] == pytest.approx(200)
    assert got["p99_ttft_ms"] == pytest.approx(100 + 0.99 * 400)
    assert got["mean_tpot_ms"] == pytest.approx(125) and got["median_e2el_ms"] == pytest.approx(500)
    assert got["mean_itl_ms"] == pytest.approx(400 / 3) and got["median_itl_ms"] == pytest.approx(100)
    assert got["max_concurrent_requests"] == 1 and got["tokens_per_event"] == 1.0


def test_a_failed_request_counts_in_no_latency_or_rate() -> None:
    broken = RequestRecord(timeline(0.0, 50.0, 99.0), 0.0)
    broken.timeline.error = "cut"
    got = serve_metrics([record(timeline(0.0, 0.1)), broken], 1.0, latencies=["e2el"], ranks=[99], goodput={})
    assert got["mean_e2el_ms"] == pytest.approx(100) and got["total_output_tokens"] == 1


def test_one_token_has_no_tpot_and_keeps_any_limit_on_it() -> None:
    got = serve_metrics([record(timeline(0.0, 0.1))], 1.0, latencies=["tpot", "itl"], ranks=[99], goodput={})
    assert got["mean_tpot_ms"] is None and got["p99_itl_ms"] is None
    assert is_good(timeline(0.0, 0.1), {"tpot": 1.0}) and not is_good(timeline(0.0, 0.1), {"e2el": 99.0})


def test_percentiles_interpolate_linearly() -> None:
    assert distribution("x", [0.1, 0.2, 0.3, 0.4], [25, 100])["p25_x_ms"] == pytest.approx(175)


def test_peak_concurrency_is_exact_and_a_handover_is_not_two() -> None:
    assert peak_concurrency([timeline(0, 1.0), timeline(1.0, 2.0), timeline(1.5, 3.0)]) == 2
    assert peak_concurrency([timeline(0, 1.0), timeline(1.0, 2.0)]) == 1
    assert peak_concurrency([]) == 0


def test_peak_throughput_is_the_best_whole_second_after_the_first_sending() -> None:
    lines = [timeline(10.0, 10.5, 11.2, 11.9, counts=[1, 4, 2]), timeline(10.2, 11.5)]
    assert peak_tokens_per_second(lines) == 7.0


# --- tokens of events --------------------------------------------------------------------------------------


def reading(*pieces: tuple[float, Piece]) -> StreamReading:
    made = StreamReading()
    for now, piece in pieces:
        made.add(now, piece)
    return made


def test_tokens_are_those_of_the_usage_and_not_the_number_of_events() -> None:
    got = reading((1.0, Piece("a b ")), (2.0, Piece("c d ")), (2.1, Piece(completion_tokens=4)))
    assert got.timed_counts(4) == ([1.0, 2.0], [2, 2])


def test_counts_that_each_event_tells_are_taken_as_they_are() -> None:
    pieces = [(1.0, Piece("a", completion_tokens=1)), (2.0, Piece("bcd", completion_tokens=4))]
    assert reading(*pieces).timed_counts(4) == ([1.0, 2.0], [1, 3])


def test_an_event_after_the_last_token_is_no_token() -> None:
    got = reading((1.0, Piece("a")), (2.0, Piece("b")), (9.0, Piece("", finish_reason="stop")))
    assert got.timed_counts(2) == ([1.0, 2.0], [1, 1]) and got.finish_reason == "stop"


def test_an_answer_without_tokens_has_no_times() -> None:
    assert StreamReading().timed_counts(0) == ([], [])


# --- arrivals ------------------------------------------------------------------------------------------------


def test_all_are_sent_at_once_without_a_rate() -> None:
    assert arrival_offsets(rates_of(3, math.inf)) == [0.0, 0.0, 0.0]


def test_the_offered_rate_is_the_one_asked_for_whatever_the_seed() -> None:
    for seed in range(5):
        offsets = arrival_offsets(rates_of(101, 4.0), 0.5, seed)
        assert offsets[0] == 0.0 and offsets[-1] == pytest.approx(25.0) and offsets == sorted(offsets)


def test_poisson_gaps_are_exponential() -> None:
    """Kolmogorov-Smirnov distance of 5,000 gaps from 1 - exp(-4 t); 1.63 / sqrt(n) is its 1 % limit."""
    gaps = np.sort(np.diff(arrival_offsets(rates_of(5001, 4.0), 1.0, seed=3)))
    distance = np.abs(1 - np.exp(-4.0 * gaps) - np.arange(1, 5001) / 5000).max()
    assert distance < 1.63 / math.sqrt(5000)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_sets_the_spread_of_the_gaps(burstiness: float) -> None:
    """The coefficient of variation of a gamma distribution of shape k is 1 / sqrt(k)."""
    gaps = np.diff(arrival_offsets(rates_of(20_001, 10.0), burstiness, seed=1))
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_are_decided_by_the_seed() -> None:
    rates = rates_of(20, 2.0)
    assert arrival_offsets(rates, seed=1) == arrival_offsets(rates, seed=1) != arrival_offsets(rates, seed=2)


def test_a_ramp_goes_from_its_first_rate_to_its_last() -> None:
    linear = rates_of(12, math.inf, "linear", 1.0, 11.0)
    assert linear == pytest.approx(list(range(1, 12)))
    exponential = rates_of(4, math.inf, "exponential", 1.0, 16.0)
    assert exponential == pytest.approx([1.0, 4.0, 16.0])
    assert arrival_offsets(linear)[-1] == pytest.approx(sum(1 / rate for rate in linear))


# --- result and report ----------------------------------------------------------------------------------------

VLLM_KEYS = """date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness
max_concurrency duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
output_throughput total_token_throughput latencies queue_times max_output_tokens_per_s max_concurrent_requests
mean_ttft_ms median_ttft_ms std_ttft_ms p50_ttft_ms p90_ttft_ms p99_ttft_ms mean_tpot_ms p99_tpot_ms mean_itl_ms
p99_itl_ms mean_e2el_ms p99_e2el_ms""".split()


def test_the_json_has_the_keys_of_vllms_file_and_the_report_its_lines() -> None:
    options = ServeOptions(
        num_prompts=2,
        metadata=("gpu=none",),
        goodput=("ttft:1000",),
        header=("x-key=secret",),
        metric_percentiles="50,90,99",
    )
    records = [record(timeline(0.0, 0.1, 0.3), due=-0.5), failed()]
    result = build_result(options, "m", "t", records, 1.0, QUIET)
    assert set(VLLM_KEYS) <= set(result) and result["gpu"] == "none" and result["request_rate"] == "inf"
    assert "secret" not in json.dumps(result, allow_nan=False)
    assert result["queue_times"] == [0.5, 0.0]
    text = render(result, options.latencies, options.percentiles)
    for line in ("Successful requests: ", "Request goodput (req/s): ", "Mean TTFT (ms): ", "P99 E2EL (ms): "):
        assert line in text
    assert "! failed 1 x: HTTP 503: full" in text


def test_the_detailed_result_has_an_entry_for_every_request() -> None:
    records = [record(timeline(1.0, 1.5, 1.75)), failed()]
    records[1].timeline.arrival = 3.0
    details = with_details({}, records)
    assert details["start_times"] == [0.0, 2.0] and details["ttfts"] == [0.5, None]
    assert details["itls"] == [[0.25], []] and details["errors"] == ["", "HTTP 503: full"]

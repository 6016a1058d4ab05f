"""Claims about what /metrics shows: vLLM's names, types, labels and buckets, and text any Prometheus reads."""

import re
from bisect import bisect_left
from pathlib import Path
from random import Random

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from mini_vllm.config import CacheConfig
from mini_vllm.core.scheduler_output import SchedulerStats
from mini_vllm.engine.metrics.prometheus import (
    HttpMetrics,
    PrometheusStatLogger,
    ServerMetrics,
    metrics_text,
    new_registry,
    token_buckets,
)
from mini_vllm.engine.metrics.series import Histogram
from mini_vllm.engine.metrics.stats import FinishedRequestStats, IterationStats
from mini_vllm.engine.process.messages import EngineInfo
from tests.engine.metrics_table import (
    PROCESS,
    VLLM_CACHE_INFO_LABELS,
    VLLM_COUNTERS,
    VLLM_GAUGES,
    VLLM_HISTOGRAMS,
    VLLM_LABEL_VALUES,
    VLLM_SUMMARIES,
    VLLM_WITH_FLAGS,
    Scrape,
)

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
INFO = EngineInfo(
    max_model_len=512, num_gpu_blocks=65, block_size=16, max_request_tokens=1024, dtype="float32", device="cpu", pid=1
)


@pytest.fixture
def metrics() -> ServerMetrics:
    metrics = ServerMetrics("tiny", CacheConfig(), INFO)
    metrics.http.observe("POST", "/v1/completions", 200, 0.2, 100, 50)
    return metrics


def absent() -> dict[str, str]:
    """The table of docs/metrics.md: what is not here, and why."""
    section = DOCS.read_text().split("## What is not here")[1]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    return {name: why for names, why in rows for name in re.findall(r"`([^`]+)`", names)}


# -- the same as vLLM's -----------------------------------------------------------------------------------------------


def test_every_metric_of_vllm_is_here_or_listed_as_absent(metrics: ServerMetrics) -> None:
    theirs = {*VLLM_GAUGES, *VLLM_COUNTERS, *VLLM_HISTOGRAMS, *VLLM_SUMMARIES, *VLLM_WITH_FLAGS}
    ours = set(Scrape(metrics.registry).families) - set(PROCESS) - {"vllm:cache_config_info"}
    assert ours | set(absent()) == theirs
    assert not ours & set(absent())


def test_types_and_labels_are_vllms(metrics: ServerMetrics) -> None:
    scrape = Scrape(metrics.registry)
    tables = {
        "gauge": VLLM_GAUGES,
        "counter": VLLM_COUNTERS,
        "summary": VLLM_SUMMARIES,
        "histogram": {name: labels for name, (labels, _) in VLLM_HISTOGRAMS.items()},
    }
    for kind, table in tables.items():
        for name in table.keys() & scrape.families.keys():
            assert scrape.families[name].type == kind, name
            assert scrape.label_names(name) == {tuple(sorted(table[name]))}, name
    for name, kind in PROCESS.items():
        assert scrape.families[name].type == kind, name


def test_buckets_are_vllms(metrics: ServerMetrics) -> None:
    scrape = Scrape(metrics.registry)
    for name, (_, bounds) in VLLM_HISTOGRAMS.items():
        assert scrape.bounds(name) == bounds, name
    text = metrics.text()[0].decode()
    assert 'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0' in text
    assert 'vllm:request_prompt_tokens_bucket{engine="0",le="500.0",model_name="tiny"} 0.0' in text


def test_token_buckets_grow_with_the_models_context() -> None:
    assert token_buckets(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert token_buckets(1000)[-1] == 1000 and token_buckets(999)[-1] == 500
    assert token_buckets(131072)[-3:] == (20000, 50000, 100000) and token_buckets(1) == (1,)


def test_every_series_of_a_known_label_is_there_from_the_start(metrics: ServerMetrics) -> None:
    scrape = Scrape(metrics.registry)
    for (name, label), values in VLLM_LABEL_VALUES.items():
        assert {sample.labels[label] for sample in scrape.families[name].samples} == values


def test_the_cache_info_has_labels_of_vllms_and_the_sizes_of_the_pool(metrics: ServerMetrics) -> None:
    ((_, labels),) = [key for key in Scrape(metrics.registry).samples if key[0] == "vllm:cache_config_info"]
    info = dict(labels)
    assert set(info) <= VLLM_CACHE_INFO_LABELS
    assert (info["block_size"], info["num_gpu_blocks"], info["enable_prefix_caching"]) == ("16", "65", "True")
    assert (info["kv_cache_size_tokens"], info["kv_cache_max_concurrency"], info["engine"]) == ("1024", "2.0", "0")


# -- as text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=1.0.0,text/plain;q=0.5",
        "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.6,application/openmetrics-text;version=0.0.1",
        "application/vnd.google.protobuf;q=0.9, Application/OpenMetrics-Text;version=x",
    ],
)
def test_both_formats_parse_and_have_no_created_series(metrics: ServerMetrics, accept: str) -> None:
    plain, plain_type = metrics.text("text/plain;version=0.0.4")
    assert plain_type.startswith("text/plain; version=0.0.4") and b"# EOF" not in plain
    modern, modern_type = metrics.text(accept)
    assert modern_type.startswith("application/openmetrics-text; version=1.0.0") and modern.endswith(b"# EOF\n")
    assert {f.name for f in parse_openmetrics(modern.decode())} == set(Scrape(metrics.registry).families)
    assert b"_created" not in plain and b"_created" not in modern


@pytest.mark.parametrize("accept", [None, "", "*/*", "text/plain, application/openmetrics-text", "a;b;;=,,", "é"])
def test_any_accept_header_gets_an_answer(metrics: ServerMetrics, accept: str | None) -> None:
    text, content_type = metrics.text(accept)
    assert b"vllm:num_requests_running" in text and content_type.startswith("text/plain")


def test_a_model_name_with_quotes_is_escaped() -> None:
    registry = new_registry()
    PrometheusStatLogger('a"b\\c\nd', 512, registry)
    assert Scrape(registry).value("vllm:generation_tokens_total", model_name='a"b\\c\nd') == 0


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = (ServerMetrics(name, CacheConfig(), INFO) for name in "ab")
    first.engine.record(SchedulerStats(num_running_reqs=3), IterationStats(0.0, num_generation_tokens=5))
    assert Scrape(first.registry)["vllm:generation_tokens_total"] == 5
    assert Scrape(second.registry)["vllm:generation_tokens_total"] == 0
    with pytest.raises(ValueError, match="Duplicated"):
        PrometheusStatLogger("c", 512, first.registry)


# -- feeding ----------------------------------------------------------------------------------------------------------


def test_gauges_are_those_of_the_last_step_and_waiting_adds_up(metrics: ServerMetrics) -> None:
    stats = SchedulerStats(num_running_reqs=3, num_waiting_reqs=7, num_waiting_deferred_reqs=2, kv_cache_usage=0.25)
    metrics.engine.record(stats, IterationStats(0.0))
    metrics.engine.record(None, IterationStats(1.0))  # an abort, of which the scheduler has said nothing yet
    scrape = Scrape(metrics.registry)
    assert (scrape["vllm:num_requests_running"], scrape["vllm:num_requests_waiting"]) == (3, 7)
    assert scrape["vllm:kv_cache_usage_perc"] == 0.25
    reasons = {r: scrape.value("vllm:num_requests_waiting_by_reason", reason=r) for r in ("capacity", "deferred")}
    assert reasons == {"capacity": 5, "deferred": 2}


def test_counters_go_on_when_the_engine_starts_again(metrics: ServerMetrics) -> None:
    for queries, hits, preemptions in ((10, 4, 1), (30, 8, 2), (5, 0, 0), (9, 3, 1)):
        stats = SchedulerStats(
            prefix_cache_queries=queries, prefix_cache_hits=hits, num_preemptions=preemptions, num_scheduled_tokens=2
        )
        before = Scrape(metrics.registry)
        metrics.engine.record(stats, IterationStats(0.0))
        assert before.falls(Scrape(metrics.registry)) == []
    scrape = Scrape(metrics.registry)
    assert (scrape["vllm:prefix_cache_queries_total"], scrape["vllm:prefix_cache_hits_total"]) == (39, 11)
    assert scrape["vllm:num_preemptions_total"] == 3
    assert scrape.value("vllm:prompt_tokens_cached_by_source_total", source="device") == 11
    assert scrape.histogram("vllm:iteration_tokens_total") == (4, 8)


def test_a_duration_that_is_not_known_is_not_observed(metrics: ServerMetrics) -> None:
    iteration = IterationStats(1.0, finished=[FinishedRequestStats(finish_reason="abort", e2e_latency=0.5)])
    metrics.engine.record(None, iteration)
    scrape = Scrape(metrics.registry)
    assert scrape.histogram("vllm:e2e_request_latency_seconds") == (1, 0.5)
    assert scrape.value("vllm:request_success_total", finished_reason="abort") == 1
    for name in ("queue", "prefill", "decode", "inference"):
        assert scrape.histogram(f"vllm:request_{name}_time_seconds") == (0, 0)
    assert scrape.histogram("vllm:request_time_per_output_token_seconds") == (0, 0)


def test_rejections_are_counted_by_reason(metrics: ServerMetrics) -> None:
    for reason in ("max_num_queued_reqs", "shutting_down", "max_num_queued_reqs"):
        metrics.engine.record_rejection(reason)
    samples = Scrape(metrics.registry).families["vllm:admission_rejections"].samples
    assert {sample.labels["reason"]: sample.value for sample in samples} == {
        "max_num_queued_reqs": 2,
        "max_num_queued_tokens": 0,
        "shutting_down": 1,
    }


def test_values_in_bulk_fall_into_the_same_buckets_as_one_by_one() -> None:
    random = Random(0)
    bounds = (0.0, 0.5, 1.0, 1.5, 4.0)
    for size in (1, 4, 5, 6, 50, 300):
        values = [random.choice((*bounds, random.uniform(-1, 6))) for _ in range(size)]
        bulk = Histogram(bounds)
        bulk.observe_all(values)
        expected = [0] * 6
        for value in values:
            expected[bisect_left(bounds, value)] += 1
        assert bulk.counts == expected and bulk.sum == pytest.approx(sum(values))


# -- HTTP -------------------------------------------------------------------------------------------------------------


def test_requests_are_counted_by_route_method_and_status_class(metrics: ServerMetrics) -> None:
    metrics.http.observe("POST", "/v1/completions", 503, 0.05, 7, 30)
    metrics.http.observe("GET", "/v1/responses/{response_id}", 404, 0.6, 0, 20)
    scrape = Scrape(metrics.registry)
    counts = {tuple(s.labels.values()): s.value for s in scrape.families["http_requests"].samples}
    assert sorted(counts.values()) == [1, 1, 1]
    assert scrape.value("http_requests_total", method="POST", status="5xx", handler="/v1/completions") == 1
    assert scrape.histogram("http_request_duration_seconds", handler="/v1/completions") == (2, pytest.approx(0.25))
    assert scrape.histogram("http_request_duration_highr_seconds") == (3, pytest.approx(0.85))
    assert scrape.histogram("http_request_size_bytes", handler="/v1/completions") == (2, 107)
    assert scrape.histogram("http_response_size_bytes", handler="/v1/completions") == (2, 80)


def test_labels_stay_few_whatever_clients_send() -> None:
    registry = new_registry()
    http = HttpMetrics(registry)
    for i in range(100):
        http.observe(f"BREW{i}", None, 404, 0.1, 0, 0)
        http.observe("GET", "/metrics", 200, 0.1, 0, 0)
    (sample,) = Scrape(registry).families["http_requests"].samples
    assert (sample.labels, sample.value) == ({"handler": "none", "method": "other", "status": "4xx"}, 100)


def test_the_text_of_an_empty_registry_is_still_valid() -> None:
    assert b"python_info" in metrics_text(new_registry())[0]

"""Claims about what is shipped around the metrics: the dashboard, its containers, and the page that explains them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_vllm.config import CacheConfig
from mini_vllm.engine.metrics.prometheus import ServerMetrics
from tests.engine.metrics_table import PROCESS, Scrape
from tests.engine.test_metrics import INFO

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "observability"
DASHBOARD = json.loads((EXAMPLE / "grafana" / "dashboards" / "mini-vllm.json").read_text())
KEYWORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool"}
FUNCTIONS = {"sum", "max", "rate", "increase", "histogram_quantile", "label_values"}


@pytest.fixture(scope="module")
def scrape() -> Scrape:
    metrics = ServerMetrics("tiny", CacheConfig(), INFO)
    metrics.http.observe("POST", "/v1/completions", 200, 0.2, 100, 50)
    return Scrape(metrics.registry)


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def selectors(expression: str) -> list[tuple[str, str]]:
    """Each metric of a PromQL expression with its label matchers. Whatever is left must be functions and labels."""
    assert all(expression.count(a) == expression.count(b) for a, b in ("()", "[]", "{}")), expression
    bare = re.sub(r"\b(by|without)\s*\([^)]*\)", "", expression)
    found = re.findall(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(?!\w|\s*\()", re.sub(r"\[[^\]]*\]", "", bare))
    called = set(re.findall(r"([a-zA-Z_]\w*)\s*\(", bare))
    assert called <= FUNCTIONS, called
    return [(name, labels) for name, labels in found if (name not in KEYWORDS and ":" in name) or "_" in name]


def test_every_metric_of_the_dashboard_is_in_our_metrics_with_the_right_suffix(scrape: Scrape) -> None:
    shown = {name for name, _ in scrape.samples}
    asked = [selector for expression in expressions() for selector in selectors(expression)]
    assert len(asked) > 40
    for name, matchers in asked:
        if name == "model_name":  # the label that label_values() lists
            continue
        assert name in shown, name
        labels = set().union(*(dict(pairs) for n, pairs in scrape.samples if n == name))
        assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= labels, (name, matchers)


def test_labels_that_panels_group_by_exist(scrape: Scrape) -> None:
    for expression in expressions():
        for names in re.findall(r"\bby\s*\(([^)]*)\)", expression):
            (metric,) = {name for name, _ in selectors(expression)}
            labels = set().union(*(dict(pairs) for n, pairs in scrape.samples if n == metric))
            assert {name.strip() for name in names.split(",")} <= labels, expression


def test_quantiles_are_of_buckets_and_rates_of_counters(scrape: Scrape) -> None:
    for expression in expressions():
        for inner in re.findall(r"(?:rate|increase)\(([\w:]+)", expression):
            assert inner.endswith(("_total", "_bucket", "_sum", "_count")), expression
        if "histogram_quantile" in expression:
            assert "_bucket" in expression and "by (le)" in expression


def test_the_dashboard_shows_what_an_operator_asks_for() -> None:
    asked = " ".join(expressions())
    for name in (
        "generation_tokens_total", "prompt_tokens_by_source_total", "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_bucket", "request_queue_time_seconds_sum",
        "num_requests_running", "num_requests_waiting_by_reason", "kv_cache_usage_perc", "prefix_cache_hits_total",
        "num_preemptions_total", "request_success_total", "admission_rejections_total",
    ):  # fmt: skip
        assert f"vllm:{name}" in asked, name


def test_the_dashboard_can_be_imported() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids)) and DASHBOARD["uid"] and DASHBOARD["title"] and DASHBOARD["schemaVersion"] >= 36
    assert "id" not in DASHBOARD, "Grafana gives its own"
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {f"${{{variable['name']}}}" for variable in DASHBOARD["templating"]["list"]}
    assert all(panel["datasource"]["uid"] in variables for panel in panels())


def test_the_containers_find_each_others_files() -> None:
    compose = yaml.safe_load((EXAMPLE / "docker-compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service["volumes"]:
            assert (EXAMPLE / volume.split(":")[0]).exists(), volume
    config = yaml.safe_load((EXAMPLE / "prometheus.yml").read_text())
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    source = yaml.safe_load((EXAMPLE / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    listens = next(a for a in compose["services"]["prometheus"]["command"] if "listen" in a)
    assert source["url"].removeprefix("http://") == listens.partition("=")[2]
    provider = yaml.safe_load((EXAMPLE / "grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][0]
    assert any(
        volume.split(":")[1] == provider["options"]["path"] for volume in compose["services"]["grafana"]["volumes"]
    )


def test_every_metric_is_explained(scrape: Scrape) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text().split("## What is not here")[0]
    explained = {
        name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`([\w:]+)`", line)
    }
    assert set(scrape.families) - set(PROCESS) <= explained
    assert {name for name in explained if name.startswith(("vllm:", "http_"))} <= set(scrape.families)

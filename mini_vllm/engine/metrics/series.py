"""Counters, gauges and histograms that cost little to feed: what `/metrics` reads out of.

A `Family` is one metric with its label names; `labels()` hands out the child for some values, which whoever feeds it
keeps, so that no step looks labels up. Families are collectors of prometheus_client, which does the text; they write
no `_created` series. Everything is fed and read on one thread.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class Value:
    """A number: a counter that somebody adds to, or a gauge that somebody sets."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class Total:
    """How many, and their sum."""

    __slots__ = ("count", "sum")

    def __init__(self) -> None:
        self.count = 0
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.count += 1
        self.sum += value


class Histogram:
    """How many values each bucket has. bounds: the largest value of each but the last, which takes the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_all(self, values: Sequence[float]) -> None:
        """Each of them. Many cost a sort, which is cheap for the latencies of one step, and a search a bucket."""
        if len(values) < len(self.bounds):
            for value in values:
                self.observe(value)
            return
        ordered = sorted(values)
        below, bucket = 0, bisect_left(self.bounds, ordered[0])
        while below < len(ordered):
            bound = self.bounds[bucket] if bucket < len(self.bounds) else float("inf")
            reached = bisect_right(ordered, bound, below)
            self.counts[bucket] += reached - below
            below, bucket = reached, bucket + 1
        self.sum += sum(ordered)


C = TypeVar("C", Value, Total, Histogram)


class Family(Collector, Generic[C]):
    """One metric. `write` adds the samples of a child with these label values to what the registry collects."""

    def __init__(
        self,
        name: str,
        help: str,
        label_names: Sequence[str],
        make_child: Callable[[], C],
        make_metric: Callable[[str, str, Sequence[str]], Metric],
        write: Callable[[Metric, Sequence[str], C], None],
    ) -> None:
        self.name = name
        self.label_names = tuple(label_names)
        self._help = help
        self._make_child: Callable[[], C] = make_child
        self._make_metric = make_metric
        self._write: Callable[[Metric, Sequence[str], C], None] = write
        self._children: dict[tuple[str, ...], C] = {}

    def labels(self, *values: str) -> C:
        """The child for these values of `label_names`, made when first asked for."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self.label_names):
                raise ValueError(f"{self.name} has the labels {self.label_names}, got {values}")
            child = self._children[values] = self._make_child()
        return child

    def collect(self) -> Iterator[Metric]:
        metric = self._make_metric(self.name, self._help, self.label_names)
        for values, child in list(self._children.items()):
            self._write(metric, values, child)
        yield metric

    def describe(self) -> Iterable[Metric]:
        """For the registry, which refuses a second metric of the same name."""
        return [self._make_metric(self.name, self._help, self.label_names)]


def counter(registry: CollectorRegistry, name: str, help: str, label_names: Sequence[str]) -> Family[Value]:
    """name: without `_total`, which the text has."""
    return _register(registry, Family(name, help, label_names, Value, _counter_metric, _write_value))


def gauge(registry: CollectorRegistry, name: str, help: str, label_names: Sequence[str]) -> Family[Value]:
    return _register(registry, Family(name, help, label_names, Value, _gauge_metric, _write_value))


def summary(registry: CollectorRegistry, name: str, help: str, label_names: Sequence[str]) -> Family[Total]:
    """Count and sum, without quantiles."""
    return _register(registry, Family(name, help, label_names, Total, _summary_metric, _write_total))


def histogram(
    registry: CollectorRegistry, name: str, help: str, label_names: Sequence[str], bounds: Sequence[float]
) -> Family[Histogram]:
    """bounds: of the buckets, ascending, without the infinite one."""
    texts = [*map(floatToGoString, bounds), "+Inf"]

    def write(metric: Metric, values: Sequence[str], child: Histogram) -> None:
        assert isinstance(metric, HistogramMetricFamily)
        metric.add_metric(values, list(zip(texts, accumulate(child.counts), strict=True)), child.sum)

    return _register(registry, Family(name, help, label_names, lambda: Histogram(bounds), _histogram_metric, write))


def _register(registry: CollectorRegistry, family: Family[C]) -> Family[C]:
    registry.register(family)
    return family


def _counter_metric(name: str, help: str, label_names: Sequence[str]) -> Metric:
    return CounterMetricFamily(name, help, labels=label_names)


def _gauge_metric(name: str, help: str, label_names: Sequence[str]) -> Metric:
    return GaugeMetricFamily(name, help, labels=label_names)


def _summary_metric(name: str, help: str, label_names: Sequence[str]) -> Metric:
    return SummaryMetricFamily(name, help, labels=label_names)


def _histogram_metric(name: str, help: str, label_names: Sequence[str]) -> Metric:
    return HistogramMetricFamily(name, help, labels=label_names)


def _write_value(metric: Metric, values: Sequence[str], child: Value) -> None:
    assert isinstance(metric, (CounterMetricFamily, GaugeMetricFamily))
    metric.add_metric(values, child.value)


def _write_total(metric: Metric, values: Sequence[str], child: Total) -> None:
    assert isinstance(metric, SummaryMetricFamily)
    metric.add_metric(values, child.count, child.sum)

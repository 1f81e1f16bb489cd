"""The service's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
JOB_SECONDS = (0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
Gauges = Callable[[], Iterable[tuple[str, str, tuple[str, ...], dict[tuple[str, ...], float]]]]
"""(name, help, labels, label values -> value), read when asked"""


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tightfit_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "tightfit_request_seconds",
            "Seconds to the answer's end.",
            ("route",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.jobs = Counter("tightfit_jobs", "Jobs that changed state.", ("kind", "state"), registry=self.registry)
        self.cached = Counter(
            "tightfit_jobs_answered",
            "Requests for jobs, by how they were answered.",
            ("kind", "how"),
            registry=self.registry,
        )
        self.worked = Histogram(
            "tightfit_worker_seconds",
            "Seconds of worker processes.",
            ("kind",),
            buckets=JOB_SECONDS,
            registry=self.registry,
        )

    def watch(self, gauges: Gauges) -> None:
        """Read `gauges` whenever the metrics are asked for."""
        self.registry.register(_GaugeCollector(gauges))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _GaugeCollector(Collector):
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, description, labels, values in self._gauges():
            family = GaugeMetricFamily(name, description, labels=labels)
            for label_values, value in values.items():
                family.add_metric(label_values, value)
            yield family

    def describe(self) -> Iterable[Metric]:
        return []

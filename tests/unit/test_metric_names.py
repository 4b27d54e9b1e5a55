"""The names of all metrics follow Prometheus' conventions, so that none is read as another kind."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from prometheus_client import REGISTRY, Metric

import libs
import services

# What Prometheus appends to the series of counters, histograms and summaries.
RESERVED_ENDINGS = ("_count", "_total", "_sum", "_bucket", "_created", "_info")
# Modules that run when they are imported or belong to tools.
SKIPPED = ("libs.gen", "__main__", ".migrations.")


def metrics_of_all_modules() -> Iterable[Metric]:
    """Imports every module of libs and services and returns what they register."""
    for package in (libs, services):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not any(part in f"{module.name}." for part in SKIPPED):
                importlib.import_module(module.name)
    return [metric for metric in REGISTRY.collect() if metric.name.startswith("headrace_")]


def test_no_gauge_ends_like_a_series_of_another_kind():
    """`…_count` is the number of observations of a histogram, not a number of things."""
    gauges = [metric for metric in metrics_of_all_modules() if metric.type == "gauge"]
    assert len(gauges) > 10
    assert [each.name for each in gauges if each.name.endswith(RESERVED_ENDINGS)] == []


def test_the_help_of_every_metric_is_a_sentence():
    """Dashboards show it."""
    for metric in metrics_of_all_modules():
        assert metric.documentation.endswith("."), metric.name

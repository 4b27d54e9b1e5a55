"""The metrics of the router, besides those of every process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

REVISION = Gauge("headrace_router_snapshot_revision", "The revision of the newest routes.")
TARGETS = Gauge("headrace_router_targets", "Deployments that have a route.", ["state"])
SKIPPED = Counter(
    "headrace_router_deployments_skipped",
    "Deployments in snapshots of the registry that could not be read.",
)

"""The metrics of the registry, besides those of every process."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

UPLOADS_RUNNING = Gauge(
    "headrace_registry_uploads_running",
    "Uploads that are running; at most HEADRACE_UPLOAD_LIMIT.",
)
UPLOADS_REFUSED = Counter(
    "headrace_registry_uploads_refused",
    "Uploads that were refused because too many were running, of all tenants or of one.",
)
ARTIFACT_BYTES = Counter(
    "headrace_registry_artifact_received_bytes", "Bytes of artifacts that were received and stored."
)
WATCHES_OPEN = Gauge("headrace_registry_watches_open", "Open watches of deployments.")
DEPLOYMENTS_REVISION = Gauge(
    "headrace_registry_deployments_revision", "The newest revision that was read for watches."
)
FEED_FAILURES = Counter(
    "headrace_registry_feed_failures",
    "Reads of the deployments that failed, other than because of an outage.",
)

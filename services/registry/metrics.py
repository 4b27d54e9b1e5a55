"""What the registry counts, beside what every process does."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

UPLOADS_RUNNING = Gauge(
    "headrace_registry_uploads_running", "Uploads that run; HEADRACE_UPLOAD_LIMIT at most."
)
UPLOADS_REFUSED = Counter(
    "headrace_registry_uploads_refused", "Uploads that found all slots taken."
)
ARTIFACT_BYTES = Counter(
    "headrace_registry_artifact_received_bytes", "Bytes of artifacts that were received and kept."
)
WATCHES_OPEN = Gauge("headrace_registry_watches_open", "Watches of deployments.")
DEPLOYMENTS_REVISION = Gauge(
    "headrace_registry_deployments_revision", "The newest revision that watchers are told."
)
FEED_FAILURES = Counter(
    "headrace_registry_feed_failures", "Reads of the deployments that failed, outages aside."
)

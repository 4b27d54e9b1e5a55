"""Logs, traces and metrics of a process, never the inputs of users.

Others use `logs`, `tracing` and `metrics` (set-up and spans), `genai`, `rpc_metrics` and
`http_metrics` (metrics by OpenTelemetry's and gRPC's names), and `hashing` (hashes of inputs).
`export` and `lines` are internal.
"""

from __future__ import annotations

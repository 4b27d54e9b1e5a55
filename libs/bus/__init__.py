"""Jobs and events over NATS JetStream: durable before acknowledged, delivered at least once."""

from __future__ import annotations

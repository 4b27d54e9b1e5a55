"""Jobs and events over NATS JetStream: durable before acknowledged, delivered at least once.

Others use `service` (`connect_service`), `connection` (`connect`, `ensure_streams`), `durability`
(`check_durable`), `publisher` (`Publisher`), `worker` (`PullWorker`, `Delivery`, `PoisonMessage`),
`broadcast` (`Broadcaster`, `listen`: not durable, only for who listens now), `erasure` (overwrites
messages), and `subjects`, which names the streams, subjects and consumers. `pull`, `inboxes` and
`delivery` are internal.
"""

from __future__ import annotations

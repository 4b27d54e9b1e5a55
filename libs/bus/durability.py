"""Checks that the NATS server writes to disk before it acknowledges.

Only clients of the system account can ask the server, so the check reads its HTTP monitoring.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request

import structlog

_log = structlog.get_logger()

REQUEST_TIMEOUT_SECONDS = 2.0
AWAY_PAUSE_SECONDS = 0.2


class NotDurableError(Exception):
    """The server acknowledges messages that it may still lose."""


async def check_durable(monitoring_url: str) -> None:
    """Checks that JetStream has `sync_interval: always`; waits until the server is up.

    Args:
        monitoring_url: the server's HTTP monitoring, such as `http://127.0.0.1:8222`.

    Raises:
        NotDurableError: the server has another `sync_interval`, or no JetStream.
    """
    is_logged = False
    while True:
        try:
            config = await asyncio.to_thread(_jetstream_config, monitoring_url)
        except OSError as error:
            if not is_logged:
                _log.warning("waiting for the monitoring of NATS", error=error)
                is_logged = True
            await asyncio.sleep(AWAY_PAUSE_SECONDS)
            continue
        if config.get("sync_always") is not True:
            raise NotDurableError(
                "JetStream does not have `sync_interval: always`: it acknowledges messages that a "
                "crash of the machine would lose"
            )
        return


def _jetstream_config(monitoring_url: str) -> dict[str, object]:
    url = f"{monitoring_url}/varz"
    # Not through a proxy of the environment, which is for servers outside the mesh.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=REQUEST_TIMEOUT_SECONDS) as answer:
        config = json.load(answer)["jetstream"].get("config", {})
    return dict(config)

"""Checks that the NATS server writes to disk before it acknowledges.

Only users of the system account can ask the server how it is configured.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nats.errors
import structlog

from libs.bus.connection import connect
from libs.tls import TlsFiles

_log = structlog.get_logger()

SERVER_CONFIG_SUBJECT = "$SYS.REQ.SERVER.PING.VARZ"
REQUEST_TIMEOUT_SECONDS = 2.0
AWAY_PAUSE_SECONDS = 0.2


class NotDurableError(Exception):
    """The server acknowledges messages that it may still lose."""


async def check_durable(url: str, credentials_file: Path, *, tls: TlsFiles | None = None) -> None:
    """Checks that JetStream has `sync_interval: always`; waits until the server is up.

    Args:
        url: as for `connect`.
        credentials_file: of a user of the system account.
        tls: as for `connect`.

    Raises:
        NotDurableError: the server has another `sync_interval`, or no JetStream.
    """
    client = await connect(url, name="durability", credentials_file=credentials_file, tls=tls)
    try:
        is_logged = False
        while True:
            try:
                answer = await client.request(
                    SERVER_CONFIG_SUBJECT, b"{}", timeout=REQUEST_TIMEOUT_SECONDS
                )
            except (nats.errors.Error, TimeoutError) as error:
                if not is_logged:
                    _log.warning("waiting for the configuration of NATS", error=error)
                    is_logged = True
                await asyncio.sleep(AWAY_PAUSE_SECONDS)
                continue
            jetstream = json.loads(answer.data)["data"].get("jetstream", {})
            if jetstream.get("config", {}).get("sync_always") is not True:
                raise NotDurableError(
                    "JetStream does not have `sync_interval: always`: it acknowledges messages "
                    "that a crash of the machine would lose"
                )
            return
    finally:
        await client.close()

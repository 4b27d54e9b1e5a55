"""The durable profile refuses a server that acknowledges before it has written."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from libs.bus.durability import NotDurableError, check_durable
from tests.support.nats import running_nats

pytestmark = pytest.mark.integration


async def test_a_server_that_syncs_always_is_durable(tmp_path: Path) -> None:
    """Also one that is not there yet is waited for."""
    async with running_nats(tmp_path) as server:
        await check_durable(server.url, server.system_credentials)
        await server.kill()
        checking = asyncio.create_task(check_durable(server.url, server.system_credentials))
        await asyncio.sleep(0.3)
        assert not checking.done()
        await server.start()
        async with asyncio.timeout(5):
            await checking


async def test_the_default_of_two_minutes_is_refused(tmp_path: Path) -> None:
    """NATS's own default would lose what it acknowledged."""
    async with running_nats(tmp_path, sync_always=False) as server:
        with pytest.raises(NotDurableError, match="sync_interval"):
            await check_durable(server.url, server.system_credentials)

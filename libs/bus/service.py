"""The connection of a service to the bus, as its settings say."""

from __future__ import annotations

from nats.aio.client import Client

from libs.bus.connection import connect
from libs.bus.durability import check_durable
from libs.config import BusSettings, DurableBusSettings


async def connect_service(settings: BusSettings, *, name: str) -> Client:
    """Connects, and checks before that that the bus is durable, where the settings ask for it.

    Args:
        settings: of the service.
        name: of the service, shown in the server's monitoring.

    Raises:
        OSError, NotDurableError: see `connect` and `check_durable`.
    """
    if isinstance(settings, DurableBusSettings) and settings.nats_system_credentials_file:
        await check_durable(
            settings.nats_url, settings.nats_system_credentials_file, tls=settings.tls
        )
    return await connect(
        settings.nats_url,
        name=name,
        credentials_file=settings.nats_credentials_file,
        tls=settings.tls,
    )

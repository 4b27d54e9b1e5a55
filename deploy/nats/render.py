"""Renders the configuration of the bus."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.nats.users import SYSTEM_USER, USERS, permissions, system_permissions
from libs.tls import TlsFiles

_TEMPLATE = Path(__file__).with_name("nats.conf")


@dataclass(frozen=True, kw_only=True)
class Bus:
    """The settings that differ between two servers.

    Attributes:
        listen_address: the `host:port` for clients.
        server_name: shown to clients.
        store_dir: the folder of the streams.
        passwords: of each user: of `users.USERS`, and `users.SYSTEM_USER`.
        tls: its certificates; clients must show one of the mesh, too.
    """

    listen_address: str
    server_name: str
    store_dir: Path
    passwords: Mapping[str, str]
    tls: TlsFiles


def config(bus: Bus) -> str:
    """Returns the text of the configuration, which has the passwords in it."""
    values: dict[str, Any] = {
        "listen_address": bus.listen_address,
        "server_name": bus.server_name,
        "store_dir": str(bus.store_dir),
        "ca_file": str(bus.tls.ca),
        "certificate_file": str(bus.tls.certificate),
        "key_file": str(bus.tls.key),
        "users": [_user(bus, name, permissions(name)) for name in USERS],
        "system_users": [_user(bus, SYSTEM_USER, system_permissions())],
    }
    template = string.Template(_TEMPLATE.read_text())
    return template.substitute({name: _text(value) for name, value in values.items()})


def _user(bus: Bus, name: str, allowed: Mapping[str, list[str]]) -> dict[str, Any]:
    return {"user": name, "password": bus.passwords[name], "permissions": dict(allowed)}


def _text(value: Any) -> str:
    """Returns a value as JSON, which NATS reads, with each element of a list on its own line."""
    if isinstance(value, list):
        return "[" + ",".join(f"\n    {json.dumps(element)}" for element in value) + "\n  ]"
    return json.dumps(value)

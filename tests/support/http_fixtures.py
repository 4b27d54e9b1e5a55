"""Fixtures for modules that import them: the HTTP client on both loops, and over TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
import uvloop

from libs.http_client import connector
from tests.support.certificates import Authority

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


# pytest-asyncio's fixture. Services run on uvloop, tests and tools on asyncio's own loop.
@pytest.fixture(name="_asyncio_loop_factory", params=LOOPS, ids=["asyncio", "uvloop"], autouse=True)
def both_loops(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(name="authority")
def trusted_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """Makes an authority that clients trust."""
    made = Authority(tmp_path)
    trusted = made.trusted()
    monkeypatch.setattr(connector, "tls_context", lambda _ca_file: trusted)
    return made


@pytest.fixture(name="tls")
def loopback_tls(authority: Authority) -> ssl.SSLContext:
    """Returns the TLS settings of a server on the loopback interface."""
    return authority.server(address="127.0.0.1")

"""Who deploys a version chooses its URL: it leads neither into the mesh's networks nor to a key."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from libs.chat.request import GenerationRequest, Message
from libs.clock import SystemClock
from libs.errors import FailedPrecondition, InvalidArgument
from libs.http_client import AddressPolicy, AddressRefusedError, Network, Proxies
from libs.http_client import connector as connector_module
from libs.rpc.status import headrace_errors
from services.inference.backends.openai_http.api_keys import ApiKeys
from services.inference.backends.openai_http.client import Provider
from services.inference.backends.stall import StallLimits
from services.inference.domain import BackendFailedError, ChatCall, Delivered
from services.inference.generation.relay import Relay
from tests.support.http_peer import answer, answering, ask, client_of, peers
from tests.support.provider import mock_provider, write_key
from tests.support.proxy import running_proxy
from tests.support.registry import CHAT, RegistryClient, artifact, serving_registry

pytestmark = pytest.mark.integration

KEY = "sk-canary-1"
PUBLIC_ONLY = AddressPolicy()
LOOPBACK = AddressPolicy.parse("127.0.0.1/32", private=False)


class Names:
    """A name server whose answers a test sets: one after the other, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.asked = 0
        self._answers = answers
        loop = asyncio.get_running_loop()
        self._real = loop.getaddrinfo
        monkeypatch.setattr(loop, "getaddrinfo", self._getaddrinfo)

    async def _getaddrinfo(self, host: str, port: int, **settings: Any) -> Any:
        if not host.endswith(".test"):
            return await self._real(host, port, **settings)
        addresses = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        return [
            (
                socket.AF_INET6 if ":" in address else socket.AF_INET,
                socket.SOCK_STREAM,
                socket.IPPROTO_TCP,
                "",
                (address, port, 0, 0) if ":" in address else (address, port),
            )
            for address in addresses
        ]


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "0.0.0.0"],  # noqa: S104
)
async def test_this_machine_is_not_connected_to(host: str):
    """In whatever spelling: not one byte arrives."""
    async with peers(answering(answer(b"secret"))) as server:
        url = server.url.replace("127.0.0.1", host)
        async with client_of(url, network=Network(policy=PUBLIC_ONLY)) as client:
            with pytest.raises(AddressRefusedError, match="no address that may be connected to"):
                await ask(client)
        assert not server.connections


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "fe80::1", "::ffff:10.0.0.1", "::"],
)
async def test_a_name_is_judged_by_its_address(monkeypatch, address: str):
    """A public name can lead anywhere."""
    Names(monkeypatch, [address])
    network = Network(policy=PUBLIC_ONLY)
    async with client_of("http://provider.test/v1", network=network) as client:
        with pytest.raises(AddressRefusedError):
            await ask(client)


async def test_a_name_that_changes_its_address_is_judged_again(monkeypatch):
    """Rebinding: what was checked is what is connected to, for each connection."""
    monkeypatch.setattr(connector_module, "ADDRESSES_SECONDS", 0.0)
    names = Names(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    async with peers(answering(answer(b"1"))) as allowed:
        other = await asyncio.start_server(_never, "127.0.0.2", allowed.port)
        url = f"http://provider.test:{allowed.port}/v1"
        async with other, client_of(url, network=Network(policy=LOOPBACK)) as client:
            assert await ask(client) == b"1"
            assert names.asked == 1
            client._idle.clear()
            with pytest.raises(AddressRefusedError):
                await ask(client)
            assert names.asked == 2


async def test_refused_addresses_of_a_name_are_passed_over(monkeypatch):
    """The allowed ones are used."""
    async with peers(answering(answer(b"1"))) as allowed:
        Names(monkeypatch, ["127.0.0.2", "10.0.0.1", "127.0.0.1"])
        url = f"http://provider.test:{allowed.port}/v1"
        async with client_of(url, network=Network(policy=LOOPBACK)) as client:
            assert await ask(client) == b"1"


async def test_a_proxy_is_no_way_around(monkeypatch):
    """What this machine resolves to a refused address is not asked of the proxy either."""
    Names(monkeypatch, ["169.254.169.254"])
    async with running_proxy() as proxy:
        network = Network(proxies=Proxies(http=proxy.url, https=proxy.url), policy=PUBLIC_ONLY)
        for url in (
            "http://169.254.169.254/latest",
            "https://10.0.0.1/v1",
            "http://provider.test/v1",
        ):
            async with client_of(url, network=network) as client:
                with pytest.raises(AddressRefusedError):
                    await ask(client)
        assert proxy.heads == []


async def test_a_provider_at_a_refused_address_is_misconfigured(tmp_path: Path):
    """Its callers learn neither address nor key, and the request is not tried again."""
    async with mock_provider() as mock:
        with pytest.raises(BackendFailedError) as caught:
            await _answer(mock.base_url, tmp_path, policy=PUBLIC_ONLY)
    assert mock.requests == []
    error = caught.value.client_error
    assert error is not None
    assert error.reason == "BACKEND_MISCONFIGURED"
    assert "HEADRACE_PROVIDER_ALLOWED_NETWORKS" in error.message
    assert "127.0.0.1" not in error.message


@pytest.mark.parametrize(
    "prefix",
    [
        "https://api.openai.com/v1",
        "http://127.0.0.1/v1",
        "http://127.0.0.1:{port}/v10",
        "http://127.0.0.1.nip.io/v1",
    ],
)
async def test_a_key_of_another_provider_is_not_sent(tmp_path: Path, prefix: str):
    """Neither is the request, which would show that there is such a key."""
    async with mock_provider() as mock:
        port = mock.base_url.split(":")[2].split("/")[0]
        write_key(tmp_path, "key", KEY, url_prefix=prefix.format(port=port))
        with pytest.raises(BackendFailedError, match="URL prefix that does not match") as caught:
            await _answer(mock.base_url, tmp_path, key_name="key")
    assert mock.requests == []
    assert KEY not in f"{caught.value} {caught.value.client_error}"


async def test_a_redirect_does_not_carry_a_key(tmp_path: Path):
    """It is not followed at all."""
    async with mock_provider("redirect") as mock:
        write_key(tmp_path, "key", KEY, url_prefix=mock.base_url)
        with pytest.raises(BackendFailedError, match="answers 307"):
            await _answer(mock.base_url, tmp_path, key_name="key")
        assert len(mock.requests) == 1


@asynccontextmanager
async def _registry(tmp_path: Path) -> AsyncIterator[RegistryClient]:
    async with serving_registry(f"sqlite+aiosqlite:///{tmp_path}/registry.db", tmp_path) as client:
        yield client


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080/v1", "http://localhost:8080", "http://[::1]/",
        "http://169.254.169.254/latest",
        "http://10.0.0.1", "http://[fd00:ec2::254]", "http://[::ffff:127.0.0.1]",
        "http://0.0.0.0:1", "http://[::]",
    ],
)  # fmt: skip
async def test_a_deployment_at_a_refused_address_is_refused(tmp_path: Path, url: str):
    """Who deploys learns it at once, and the setting that decides."""
    async with _registry(tmp_path) as registry:
        await registry.register("gpt", "1.0.0", manifest=_manifest(url))
        with (
            pytest.raises(FailedPrecondition, match="HEADRACE_PROVIDER_ALLOWED") as raised,
            headrace_errors(),
        ):
            await registry.deploy("deployments/gpt", "models/gpt/versions/1.0.0")
    assert raised.value.reason == "PROVIDER_ADDRESS_NOT_ALLOWED"


@pytest.mark.parametrize(
    "url",
    [
        "http://2130706433/v1", "http://0x7f000001", "http://127.1", "http://0177.0.0.1", "http://127.0.0.1.",
        "https://api.openai.com\\@evil.org", "https://api.openai.com/v1/../../x", "https://u:p@api.openai.com",
        "https://api.openai.com/%2e%2e/x", "file:///etc/passwd", "gopher://127.0.0.1:6379/x",
    ],
)  # fmt: skip
async def test_a_version_with_an_odd_url_is_refused(tmp_path: Path, url: str):
    """Parsers disagree about it."""
    async with _registry(tmp_path) as registry:
        with pytest.raises(InvalidArgument, match='"base_url" must be'), headrace_errors():
            await registry.register("gpt", "1.0.0", manifest=_manifest(url))


async def test_a_deployment_cannot_move_to_a_refused_address(tmp_path: Path):
    """An update is checked like a new one."""
    async with _registry(tmp_path) as registry:
        await registry.register("gpt", "1.0.0", manifest=_manifest("https://8.8.8.8/v1"))
        digest = await registry.upload(artifact(_manifest("http://10.0.0.1/v1")))
        await registry.create_version("models/gpt/versions/1.1.0", digest)
        await registry.deploy("deployments/gpt", "models/gpt/versions/1.0.0")
        with pytest.raises(FailedPrecondition, match=r"10\.0\.0\.1 has no"), headrace_errors():
            await registry.update(
                "deployments/gpt", "spec.model_version", version="models/gpt/versions/1.1.0"
            )


def _manifest(url: str) -> dict[str, Any]:
    return CHAT | {"provider": {"base_url": url, "model": "gpt-9", "api_key_name": ""}}


async def _answer(
    url: str, folder: Path, *, key_name: str = "", policy: AddressPolicy = LOOPBACK
) -> None:
    provider = Provider(
        url,
        api_key_name=key_name,
        keys=ApiKeys(folder, clock=SystemClock()),
        stall=StallLimits(),
        clock=SystemClock(),
        network=Network(policy=policy),
    )
    request = GenerationRequest(model="m", messages=(Message("user", "hello"),))
    call = ChatCall(request_id="r", request=request)
    try:
        await provider.generate("m", call, max_tokens=1, delivered=Delivered(), relay=Relay())
    finally:
        await provider.close()


async def _never(_reader: Any, writer: Any) -> None:
    writer.close()
    raise AssertionError("a refused address was connected to")

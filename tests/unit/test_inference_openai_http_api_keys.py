"""Files with the API keys of providers."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import pytest

from libs.clock import SystemClock
from libs.errors import FailedPrecondition
from libs.http_client import Url
from services.inference.backends.openai_http import api_keys
from services.inference.backends.openai_http.api_keys import MAX_AGE_SECONDS, ApiKeys


class Clock(SystemClock):
    """Stands still until a test advances it."""

    seconds = 0.0

    def monotonic_seconds(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def keys(tmp_path, clock):
    return ApiKeys(tmp_path, clock=clock)


URL = Url.parse("https://api.example.com/v1")


def write(path, key: object, *, url_prefix: object = "https://api.example.com/v1") -> None:
    write_content(path, json.dumps({"key": key, "url_prefix": url_prefix}))


def write_content(path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o600)


async def test_a_key_is_sent_to_its_urls(tmp_path, keys):
    """Those that start with its prefix, by whole parts of the path."""
    write(tmp_path / "openai", "sk-1")
    assert await keys.get("openai", URL) == "sk-1"
    assert await keys.get("openai", Url.parse("https://API.example.com:443/v1/eu/")) == "sk-1"


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.org/v1",
        "http://api.example.com/v1",
        "https://api.example.com:8443/v1",
        "https://api.example.com",
        "https://api.example.com/v10",
        "https://api.example.com/V1",
        "https://api.example.com.evil.org/v1",
        "https://api-example.com/v1",
        "https://sub.api.example.com/v1",
    ],
)
async def test_a_key_is_sent_nowhere_else(tmp_path, keys, url):
    """Whoever deploys a version chooses its URL. The error does not say where the key may go."""
    write(tmp_path / "openai", "sk-1")
    with pytest.raises(FailedPrecondition, match="has a URL prefix that does not match") as caught:
        await keys.get("openai", Url.parse(url))
    assert "api.example.com" not in caught.value.message


async def test_a_key_without_urls_is_sent_nowhere(tmp_path, keys):
    """As earlier versions of Headrace kept it. The message says what to do."""
    write_content(tmp_path / "openai", "sk-1\n")
    with pytest.raises(
        FailedPrecondition, match="`headrace provider key add NAME --url-p"
    ) as caught:
        await keys.get("openai", URL)
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "{}", "{", '{"key": "sk-1"}', '{"key": "sk-1", "url_prefix": ""}', "[" * 9000, b"{\xff}",
        '{"key": "sk-1", "url_prefix": "https://a/../b"}', '{"key": "sk-1", "url_prefix": 1}',
        '{"url_prefix": "https://api.example.com/v1"}',
    ],
)  # fmt: skip
async def test_a_file_of_another_form_is_refused_and_not_shown(tmp_path, keys, content):
    """It is sent nowhere."""
    write_content(tmp_path / "openai", content)
    with pytest.raises(FailedPrecondition) as caught:
        await keys.get("openai", URL)
    assert "sk-1" not in str(caught.value)


async def test_a_replaced_key_is_used_within_a_second(tmp_path, keys, clock):
    """Keys are rotated without a restart; until then no file is read."""
    write(tmp_path / "openai", "sk-1")
    assert await keys.get("openai", URL) == "sk-1"
    write(tmp_path / "new", "sk-2")
    (tmp_path / "new").replace(tmp_path / "openai")
    assert await keys.get("openai", URL) == "sk-1"
    clock.seconds += MAX_AGE_SECONDS
    assert MAX_AGE_SECONDS <= 1
    assert await keys.get("openai", URL) == "sk-2"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
async def test_a_key_that_others_can_read_is_refused(tmp_path, keys, clock, mode):
    """Also if its mode was changed after it was read."""
    write(tmp_path / "openai", "sk-1")
    await keys.get("openai", URL)
    (tmp_path / "openai").chmod(mode)
    clock.seconds += MAX_AGE_SECONDS
    for _ in range(2):  # read, and remembered
        with pytest.raises(FailedPrecondition, match="chmod 600") as caught:
            await keys.get("openai", URL)
        assert "sk-1" not in str(caught.value)
    (tmp_path / "openai").chmod(0o600)
    clock.seconds += MAX_AGE_SECONDS
    assert await keys.get("openai", URL) == "sk-1"


async def test_a_removed_key_is_refused_within_a_second(tmp_path, keys, clock):
    """However often it was used before."""
    write(tmp_path / "openai", "sk-1")
    await keys.get("openai", URL)
    (tmp_path / "openai").unlink()
    clock.seconds += MAX_AGE_SECONDS
    with pytest.raises(FailedPrecondition, match="No such file"):
        await keys.get("openai", URL)


@pytest.mark.parametrize(
    "key", ["", "\n", "sk-1\r\nx-admin: 1", "sk 1", "sk-\u00e4", "\x00", "x" * 9000, 7, None]
)
async def test_an_invalid_key_is_refused_and_not_shown(tmp_path, keys, key):
    """It becomes a header: two lines would be two headers."""
    write(tmp_path / "openai", key)
    with pytest.raises(FailedPrecondition, match="not a valid key") as caught:
        await keys.get("openai", URL)
    assert "admin" not in str(caught.value)


@pytest.mark.parametrize("name", ["../keys/edge.pem", "/etc/passwd", ".hidden", "", "a/b", "a\nb"])
async def test_a_name_cannot_leave_the_folder(keys, name):
    """The name comes with an artifact."""
    with pytest.raises(FailedPrecondition, match="name"):
        await keys.get(name, URL)


async def test_a_missing_key_is_named(tmp_path, keys):
    """So that an operator knows which file to write; folders and pipes are refused."""
    with pytest.raises(FailedPrecondition, match="'openai' No such file"):
        await keys.get("openai", URL)
    (tmp_path / "folder").mkdir(0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(FailedPrecondition):
            await asyncio.wait_for(keys.get(name, URL), 5)


async def test_files_are_read_in_a_thread_and_once_for_many_requests(tmp_path, keys, monkeypatch):
    """A slow disk delays the requests that need the key, and not the event loop."""
    write(tmp_path / "openai", "sk-1")
    threads: list[threading.Thread] = []
    is_released = threading.Event()
    read_file = api_keys._read_file

    def slow(path):
        threads.append(threading.current_thread())
        is_released.wait(10)
        return read_file(path)

    monkeypatch.setattr(api_keys, "_read_file", slow)
    requests = [asyncio.create_task(keys.get("openai", URL)) for _ in range(10)]
    await asyncio.sleep(0.05)  # the loop runs
    requests[0].cancel()
    await asyncio.sleep(0)
    is_released.set()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == ["sk-1"] * 9
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()
    assert await keys.get("openai", URL) == "sk-1"
    assert len(threads) == 1

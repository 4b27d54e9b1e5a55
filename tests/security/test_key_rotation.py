"""Keys are replaced while calls go on: the edge reads them again, and no call fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cli import keys as commands
from deploy.keys import keys_dir
from deploy.local.edge_record import write_edge
from deploy.local.layout import Layout
from deploy.local.ports import EDGE, port_names
from tests.support.scripted import GENERATE_PATH, ScriptedMesh, scripted_mesh

pytestmark = pytest.mark.integration

_CALLERS = 8
_ROTATIONS = 3


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch) -> AsyncIterator[ScriptedMesh]:
    """A mesh that the command line finds."""
    async with scripted_mesh(tmp_path) as running:
        port = int(running.edge.address.rpartition(":")[2])
        layout = Layout(home=tmp_path)
        ports = dict.fromkeys(port_names(layout), 9) | {EDGE: port}
        layout.ports_file.write_text(json.dumps(ports))
        write_edge(layout, ports)
        monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
        yield running


async def _status(mesh: ScriptedMesh, token: str) -> int:
    headers = {"authorization": f"Bearer {token}"}
    async with mesh.http.post(GENERATE_PATH, json={}, headers=headers) as response:
        await response.read()
        return response.status


async def test_no_call_fails_while_the_key_is_replaced(mesh: ScriptedMesh) -> None:
    """Neither with old tokens nor with new ones, from the first one on."""
    statuses: list[int] = []
    rotating = True
    first = mesh.edge.token()

    async def call(*, fresh: bool) -> None:
        while rotating:
            token = await asyncio.to_thread(mesh.edge.token) if fresh else first
            statuses.append(await _status(mesh, token))

    callers = [asyncio.create_task(call(fresh=number % 2 == 0)) for number in range(_CALLERS)]
    try:
        for _ in range(_ROTATIONS):
            before = (keys_dir(mesh.edge.home) / "edge.pem").read_bytes()
            await asyncio.to_thread(commands.rotate_key)
            assert (keys_dir(mesh.edge.home) / "edge.pem").read_bytes() != before
            assert await _status(mesh, mesh.edge.token()) == 200
    finally:
        rotating = False
        await asyncio.gather(*callers)
    assert set(statuses) == {200}
    assert len(statuses) > 20 * _ROTATIONS


async def test_now_ends_old_tokens_at_the_edge(mesh: ScriptedMesh, capsys) -> None:
    """Also those that it has verified before and remembers."""
    old = mesh.edge.token()
    for _ in range(20):  # each of the edge's threads has seen it
        assert await _status(mesh, old) == 200
    await asyncio.to_thread(commands.rotate_key, True, True)
    _, start, rows = capsys.readouterr().out.partition("[\n")  # the services' logs come first
    (current,) = json.loads(start + rows)
    assert current["state"] == "signs"
    assert {await _status(mesh, old) for _ in range(20)} == {401}
    assert await _status(mesh, mesh.edge.token()) == 200


async def test_a_broken_file_changes_nothing(mesh: ScriptedMesh) -> None:
    """The edge goes on with the keys that it has; it never goes on without any."""
    token, stranger = mesh.edge.token(), "eyJhbGciOiJub25lIn0.e30."
    path = mesh.edge.home / "run" / "tokens.json"
    for content in (b"", b"{", b'{"resources": []}', path.read_bytes()[:-200]):
        draft = path.with_name("draft")
        draft.write_bytes(content)
        draft.replace(path)
        await asyncio.sleep(0.2)
        assert await _status(mesh, token) == 200
        assert await _status(mesh, stranger) == 401
    await asyncio.to_thread(commands.rotate_key)
    assert await _status(mesh, mesh.edge.token()) == 200

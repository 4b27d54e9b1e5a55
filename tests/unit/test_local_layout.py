"""The settings that select a mesh."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.layout import Layout


def test_the_default_folder_is_in_the_repository():
    """Without settings there is one mesh, in `.headrace`."""
    layout = Layout.of({})

    assert layout == Layout(home=REPOSITORY / ".headrace", edge_port=None)


def test_settings_choose_the_mesh(tmp_path: Path):
    """Folder and port come from the environment; links in the path are resolved."""
    (tmp_path / "link").symlink_to(tmp_path / "mesh")

    layout = Layout.of({"HEADRACE_HOME": str(tmp_path / "link"), "HEADRACE_EDGE_PORT": "9000"})

    assert layout == Layout(home=tmp_path / "mesh", edge_port=9000)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "80.0", "²"])
def test_an_invalid_port_is_refused(port: str):
    """The user sees which variable is wrong."""
    with pytest.raises(CliError, match="HEADRACE_EDGE_PORT must be a port number"):
        Layout.of({"HEADRACE_EDGE_PORT": port})


@pytest.mark.parametrize("name", ["x" * 100, "a,b", "100%", "ä"])
def test_a_folder_whose_path_is_no_socket_path_has_sockets_elsewhere(tmp_path: Path, name: str):
    """Such paths are too long for the kernel, or mean something else in gRPC's addresses."""
    layout = Layout.of({"HEADRACE_HOME": str(tmp_path / name)})
    other = Layout.of({"HEADRACE_HOME": str(tmp_path / f"{name}2")})

    assert re.fullmatch(rf"/tmp/headrace-{os.geteuid()}-[0-9a-f]{{12}}", str(layout.sockets))  # noqa: S108
    assert layout.sockets != other.sockets
    layout.make_folders()
    try:
        assert layout.sockets.stat().st_mode & 0o777 == 0o700
    finally:
        layout.sockets.rmdir()


def test_usual_folders_have_their_sockets_inside(tmp_path: Path):
    """Also with spaces."""
    layout = Layout.of({"HEADRACE_HOME": str(tmp_path / "my mesh")})

    assert layout.sockets == layout.run


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a folder away")
def test_a_folder_of_another_account_is_refused(tmp_path: Path):
    """Its owner could listen in the mesh's place, and read what callers send."""
    layout = Layout(home=tmp_path / "mesh")
    layout.make_folders()
    os.chown(layout.run, 65533, 65533)

    with pytest.raises(CliError, match="belongs to another account"):
        layout.make_folders()


def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path):
    """It may lead to a folder of another account."""
    layout = Layout(home=tmp_path / "mesh")
    layout.home.mkdir()
    (tmp_path / "elsewhere").mkdir()
    layout.run.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CliError, match="not a link"):
        layout.make_folders()


def test_a_home_that_others_may_change_is_refused(tmp_path: Path):
    """They could replace the folders in it."""
    layout = Layout(home=tmp_path / "mesh")
    layout.home.mkdir()
    layout.home.chmod(0o777)

    with pytest.raises(CliError, match="chmod go-w"):
        layout.make_folders()


def test_other_users_cannot_read_the_state(tmp_path: Path):
    """The folders of logs, records and artifacts are private."""
    layout = Layout(home=tmp_path / "mesh")
    layout.run.mkdir(mode=0o755, parents=True)  # as an earlier version made it

    layout.make_folders()

    folders = [layout.run, *layout.home.iterdir()]
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}

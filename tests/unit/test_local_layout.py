"""The settings that select a mesh."""

from __future__ import annotations

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


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path):
    """The path of a Unix socket is limited; supervisord's message would come later."""
    with pytest.raises(CliError, match="too long"):
        Layout.of({"HEADRACE_HOME": str(tmp_path / ("x" * 100))})


def test_other_users_cannot_read_the_state(tmp_path: Path):
    """The folders of logs, records and artifacts are private."""
    layout = Layout(home=tmp_path / "mesh")

    layout.make_folders()

    assert {folder.stat().st_mode & 0o077 for folder in (layout.home, layout.run, layout.logs)} == {
        0
    }

"""Which mesh is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.errors import CliError
from deploy.host import REPOSITORY
from deploy.local.layout import Layout


def test_state_lives_in_the_repository_unless_told_otherwise():
    """Without settings there is one mesh, in `.headrace`."""
    layout = Layout.of({})

    assert layout == Layout(home=REPOSITORY / ".headrace", edge_port=None)


def test_settings_choose_the_mesh(tmp_path: Path):
    """Folder and port come from the environment; the folder is the same from wherever one calls."""
    (tmp_path / "link").symlink_to(tmp_path / "mesh")

    layout = Layout.of({"HEADRACE_HOME": str(tmp_path / "link"), "HEADRACE_EDGE_PORT": "9000"})

    assert layout == Layout(home=tmp_path / "mesh", edge_port=9000)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http", "80.0", "²"])
def test_a_port_that_is_none_is_refused(port: str):
    """The user is told, not shown a traceback."""
    with pytest.raises(CliError, match="HEADRACE_EDGE_PORT must be a port number"):
        Layout.of({"HEADRACE_EDGE_PORT": port})


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path: Path):
    """A Unix socket's path is short; better said at once than by supervisord."""
    with pytest.raises(CliError, match="too long"):
        Layout.of({"HEADRACE_HOME": str(tmp_path / ("x" * 100))})


def test_other_users_cannot_look_into_the_state(tmp_path: Path):
    """Logs, records and artifacts are the user's own."""
    layout = Layout(home=tmp_path / "mesh")

    layout.make_folders()

    assert {folder.stat().st_mode & 0o077 for folder in (layout.home, layout.run, layout.logs)} == {
        0
    }

"""Key files."""

from __future__ import annotations

import pytest

from libs.errors import FailedPrecondition
from services.inference.backends.openai_http.api_keys import ApiKeys


def write(path, content: str | bytes, mode: int = 0o600) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)


def test_a_key_is_its_file_without_white_space_around_it(tmp_path):
    """Editors and `echo` leave a line end."""
    write(tmp_path / "openai", "sk-1\n")
    assert ApiKeys(tmp_path).get("openai") == "sk-1"


def test_a_replaced_key_is_used_at_once(tmp_path):
    """Keys are rotated without a restart."""
    keys = ApiKeys(tmp_path)
    write(tmp_path / "openai", "sk-1")
    assert keys.get("openai") == "sk-1"
    write(tmp_path / "new", "sk-2")
    (tmp_path / "new").replace(tmp_path / "openai")
    assert keys.get("openai") == "sk-2"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_can_read_is_not_used(tmp_path, mode):
    """Also one whose mode was changed after it was read."""
    keys = ApiKeys(tmp_path)
    write(tmp_path / "openai", "sk-1")
    keys.get("openai")
    (tmp_path / "openai").chmod(mode)
    with pytest.raises(FailedPrecondition, match="chmod 600") as caught:
        keys.get("openai")
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "\n", "sk-1\r\nx-admin: 1", "sk 1", "sk-\u00e4", b"\x00", "x" * 9000]
)
def test_what_is_no_key_is_refused_and_not_told(tmp_path, content):
    """It would become a header: two lines would be two headers."""
    write(tmp_path / "openai", content)
    with pytest.raises(FailedPrecondition, match="no key") as caught:
        ApiKeys(tmp_path).get("openai")
    assert "admin" not in str(caught.value)


@pytest.mark.parametrize("name", ["../keys/edge.pem", "/etc/passwd", ".hidden", "", "a/b", "a\nb"])
def test_a_name_does_not_lead_out_of_the_folder(tmp_path, name):
    """The name comes with an artifact."""
    with pytest.raises(FailedPrecondition, match="name"):
        ApiKeys(tmp_path).get(name)


def test_a_missing_key_is_told_by_name(tmp_path):
    """So that an operator knows which file to write; a folder is none."""
    with pytest.raises(FailedPrecondition, match="'openai' No such file"):
        ApiKeys(tmp_path).get("openai")
    (tmp_path / "folder").mkdir(0o700)
    with pytest.raises(FailedPrecondition):
        ApiKeys(tmp_path).get("folder")

"""No log call writes the words of an exception: the log describes exceptions that it gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import libs
import services

_LEVELS = frozenset({"debug", "info", "warning", "error", "critical", "exception", "msg"})
_WORDS = frozenset({"message", "args", "body", "details"})
# Values that cannot quote a request, and why.
_ALLOWED = {
    # Errors of loading a version, before any request: Triton's, about files and settings.
    ("services/pool_agent/reconciler.py", "error"),
    ("services/pool_agent/pool.py", "error"),
    ("services/pool_agent/wire.py", "error"),
    ("services/pool_agent/reporter.py", "details"),
    # Texts of `BackendFailedError`, which do not quote requests.
    ("services/inference/generation/failover.py", "error"),
    ("services/inference/generation/fallback.py", "because"),
    ("services/inference/tensors/retry.py", "error"),
    # What the registry says of its own rows.
    ("services/router/wire.py", "error"),
    ("services/registry/feed.py", "error"),
    # Usage has ids and counts, no contents.
    ("services/cost/consumer.py", "usage"),
    ("services/cost/consumer.py", "error"),
}


def log_calls() -> Iterator[tuple[str, ast.Call]]:
    """Finds all calls of a method of `_log` or `self._log`, with their files."""
    for package in (libs, services):
        (root,) = package.__path__
        for path in sorted(Path(root).rglob("*.py")):
            if "gen" in path.relative_to(root).parts:
                continue
            name = str(path.relative_to(Path(root).parent))
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _is_log(node.func):
                    yield name, node


def test_log_calls_pass_exceptions_and_not_their_words() -> None:
    """`error=error`, never `repr(error)`, `str(error)`, `error.message` or an f-string of it."""
    calls = list(log_calls())
    assert len(calls) > 50
    found = []
    for file, call in calls:
        values = {"event": call.args[0]} if call.args else {}
        values |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        found += [
            f"{file}:{call.lineno}: {name}"
            for name, value in values.items()
            if (file, name) not in _ALLOWED and _quotes(value)
        ]
    assert found == []


def test_spans_record_no_exceptions() -> None:
    """They would carry the message to the collector."""
    for package in (libs, services):
        (root,) = package.__path__
        for path in sorted(Path(root).rglob("*.py")):
            assert "record_exception(" not in path.read_text(), path


def _is_log(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute) or function.attr not in _LEVELS:
        return False
    owner = function.value
    return (isinstance(owner, ast.Name) and owner.id == "_log") or (
        isinstance(owner, ast.Attribute) and owner.attr == "_log"
    )


def _quotes(value: ast.expr) -> bool:
    nodes = list(ast.walk(value))
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in _WORDS and id(node) not in owners:
            return True
        if isinstance(node, ast.JoinedStr):
            return True
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"repr", "str", "_text"}
        ):
            return True
    return False

"""Background tasks whose errors are logged and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog
from prometheus_client import Counter

_log = structlog.get_logger()

FAILURES = Counter(
    "headrace_background_task_failures", "Background tasks that ended with an error.", ["task"]
)

T = TypeVar("T")


def start_task(work: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
    """Starts a task; an error that ends it is logged and counted immediately.

    The caller keeps a reference to the task, else asyncio may collect it before it ends.

    Args:
        work: runs in the task.
        name: a fixed name, which becomes the label of a metric.
    """
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report_failure)
    return task


def _report_failure(task: asyncio.Task[Any]) -> None:
    if task.cancelled() or (error := task.exception()) is None:
        return
    FAILURES.labels(task.get_name()).inc()
    _log.error("background task failed", task=task.get_name(), exc_info=error)

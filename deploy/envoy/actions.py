"""How the edge forwards one kind of call: how long it may take, what is retried, which filters run.

A call whose request is one message, or one body of HTTP, has two routes. Until all of the body has
arrived, the edge keeps it, under the timeouts for bodies, and no service knows of the call: bodies
that arrive slowly or never take no place of a service. Then the filter `set_filter_state` marks the
call as complete and has its route looked up again.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deploy.envoy.limits import Limits

# The name of the routes of incomplete requests, which distinguishes their timeouts from others.
INCOMPLETE = "incomplete"
_COMPLETE_KEY = "headrace.request"
_COMPLETE = "complete"

_FILTER = "type.googleapis.com/envoy.config.route.v3.FilterConfig"
# These filters are disabled except where a route enables them.
COUNTED: Mapping[str, Any] = MappingProxyType(
    {"envoy.filters.http.grpc_stats": {"@type": _FILTER, "config": {}}}
)
SMALL: Mapping[str, Any] = MappingProxyType(
    {"envoy.filters.http.body_size_limit": {"@type": _FILTER, "config": {}}}
)
RATE_LIMIT_FILTER = "envoy.filters.http.local_ratelimit"
NOT_TRANSCODED: Mapping[str, Any] = MappingProxyType(
    {"envoy.filters.http.grpc_json_transcoder": {"@type": _FILTER, "disabled": True}}
)
# The service has seen nothing of these, so that any call may be sent again.
RETRY_UNSENT = "connect-failure,refused-stream,reset-before-request"
RETRY_READ = f"{RETRY_UNSENT},unavailable"
RETRY_HTTP_READ = f"{RETRY_UNSENT},retriable-status-codes"


def forwarded(
    cluster: str, limits: Limits, *, max_seconds: int, streams_requests: bool = False
) -> dict[str, Any]:
    """Returns the action of a route.

    Args:
        cluster: where the call goes.
        limits: the limits of the edge.
        max_seconds: the longest that a call may run, whatever its deadline is.
        streams_requests: whether the caller sends more messages while the call runs.
    """
    limit = f"{max_seconds}s"
    return {
        "cluster": cluster,
        "timeout": "0s",  # streams are long; the next line limits them
        "max_stream_duration": {"max_stream_duration": limit, "grpc_timeout_header_max": limit},
        # A caller that only waits may send nothing until `max_seconds` are over.
        "idle_timeout": f"{limits.stream_idle_seconds}s" if streams_requests else "0s",
    }


def retries(retry_on: str) -> dict[str, Any]:
    """Returns a retry policy for these failures; see `RETRY_UNSENT` and the others."""
    return {
        "retry_on": retry_on,
        "num_retries": 3,
        "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        "host_selection_retry_max_attempts": 3,
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host"
                    ".previous_hosts.v3.PreviousHostsPredicate"
                },
            }
        ],
    }


def once_complete(
    route: Mapping[str, Any], limits: Limits, *, max_body_bytes: int
) -> list[dict[str, Any]]:
    """Returns the two routes of a call that is forwarded when all of its body has arrived."""
    filters = {**route.get("typed_per_filter_config", {}), **_buffered(max_body_bytes)}
    both = {**route, "typed_per_filter_config": filters}
    complete = {"key": _COMPLETE_KEY, "string_match": {"exact": _COMPLETE}}
    return [
        {**both, "match": {**route["match"], "filter_state": [complete]}},
        # Without `max_stream_duration`, the one of the listener applies, `body_seconds`, and the
        # caller's `grpc-timeout` stays as it is until the second look-up.
        {
            **both,
            "name": INCOMPLETE,
            "route": {
                "cluster": route["route"]["cluster"],
                "timeout": "0s",
                "idle_timeout": f"{limits.body_idle_seconds}s",
            },
        },
    ]


def complete_marker() -> dict[str, Any]:
    """Returns the configuration of the filter that marks a request as complete."""
    return {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.set_filter_state.v3.Config",
        "on_request_headers": [
            {
                "object_key": _COMPLETE_KEY,
                "factory_key": "envoy.string",
                "format_string": {"text_format_source": {"inline_string": _COMPLETE}},
            }
        ],
        "clear_route_cache": True,
    }


def _buffered(max_bytes: int) -> dict[str, Any]:
    buffer = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
        "buffer": {"max_request_bytes": max_bytes},
    }
    return {
        "envoy.filters.http.buffer": {"@type": _FILTER, "config": buffer},
        "envoy.filters.http.set_filter_state": {"@type": _FILTER, "config": complete_marker()},
    }

"""What the edge does when callers come too fast or hold too much."""

from __future__ import annotations

from typing import Any

from deploy.envoy.limits import MIB, Limits
from libs.rpc.identity import TENANT_KEY

# The tenants, and the addresses, whose rates are known; the one not seen for longest is forgotten.
MAX_KNOWN = 10_000
# The largest burst, as a multiple of the requests of a second.
BURST = 2
# Memory of one stream from which on it is among those that are ended for it: 64 KiB.
_TRACKED_POWER_OF_TWO = 16
_HEAP = "envoy.resource_monitors.fixed_heap"
_CONNECTIONS = "envoy.resource_monitors.global_downstream_max_connections"


def tenant_rate(limits: Limits) -> dict[str, Any]:
    """Returns the configuration of the filter `local_ratelimit` for calls with a token."""
    header = {"header_name": TENANT_KEY, "descriptor_key": "tenant"}
    return _rate({"request_headers": header}, "tenant", limits.tenant_requests_per_second)


def address_rate(limits: Limits) -> dict[str, Any]:
    """Returns the configuration of the same filter for a route without a token."""
    return _rate({"remote_address": {}}, "remote_address", limits.open_requests_per_second)


def _rate(action: dict[str, Any], key: str, per_second: int) -> dict[str, Any]:
    always = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
    bucket = {
        "max_tokens": BURST * per_second,
        "tokens_per_fill": per_second,
        "fill_interval": "1s",
    }
    return {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.local_ratelimit.v3"
        ".LocalRateLimit",
        "stat_prefix": key,
        "filter_enabled": always,
        "filter_enforced": always,
        "rate_limits": [{"actions": [action]}],
        # Without a value: each tenant, or each address, has a bucket of its own.
        "descriptors": [{"entries": [{"key": key}], "token_bucket": bucket}],
        "max_dynamic_descriptors": MAX_KNOWN,
        # Required; it is for calls without a tenant or an address, and there are none.
        "token_bucket": bucket,
        "always_consume_default_token_bucket": False,
        "rate_limited_as_resource_exhausted": True,
    }


def overload_manager(limits: Limits) -> dict[str, Any]:
    """Returns what Envoy does as its memory or its connections come to an end."""
    monitors = "type.googleapis.com/envoy.extensions.resource_monitors"
    return {
        "refresh_interval": "0.1s",
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": _TRACKED_POWER_OF_TWO},
        "resource_monitors": [
            {
                "name": _HEAP,
                "typed_config": {
                    "@type": f"{monitors}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": limits.max_heap_mib * MIB,
                },
            },
            {
                "name": _CONNECTIONS,
                "typed_config": {
                    "@type": f"{monitors}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": limits.max_connections,
                },
            },
        ],
        "actions": [
            _returned_memory(limits),
            _shorter_timeouts(),
            # Those that hold the most of the memory first, long before others are refused. It acts
            # when the pressure changes, so the range goes up to where it is too late.
            _action("reset_high_memory_stream", _between(0.60, 0.98)),
            _action("disable_http_keepalive", {"threshold": {"value": 0.92}}),
            _action("stop_accepting_requests", {"threshold": {"value": 0.95}}),
            _action("stop_accepting_connections", {"threshold": {"value": 0.98}}),
        ],
    }


def _returned_memory(limits: Limits) -> dict[str, Any]:
    """Returns memory that streams have freed to the system; else it would count as used."""
    return {
        **_action("shrink_heap", {"threshold": {"value": 0.60}}),
        "typed_config": {
            "@type": "type.googleapis.com/envoy.config.overload.v3.ShrinkHeapConfig",
            "timer_interval": "1s",
            "max_unfreed_memory_bytes": limits.max_heap_mib * MIB // 16,
        },
    }


def _shorter_timeouts() -> dict[str, Any]:
    """Ends idle streams and connections sooner, as memory or connections come to an end."""
    memory = {"name": _HEAP, **_between(0.60, 0.80)}
    connections = {"name": _CONNECTIONS, **_between(0.50, 0.75)}
    timers = [
        {"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": "2s"},
        {"timer": "HTTP_DOWNSTREAM_STREAM_IDLE", "min_timeout": "5s"},
    ]
    return {
        "name": "envoy.overload_actions.reduce_timeouts",
        "triggers": [memory, connections],
        "typed_config": {
            "@type": "type.googleapis.com/envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
            "timer_scale_factors": timers,
        },
    }


def _action(name: str, trigger: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": f"envoy.overload_actions.{name}",
        "triggers": [{"name": _HEAP, **trigger}],
    }


def _between(start: float, full: float) -> dict[str, Any]:
    return {"scaled": {"scaling_threshold": start, "saturation_threshold": full}}

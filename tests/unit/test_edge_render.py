"""The edge's configuration is whole, bounded, and refuses settings that cannot work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from deploy.envoy.render import CLUSTERS, Edge, argv, config_path, render
from deploy.envoy.replies import local_replies
from deploy.envoy.routes import (
    MAX_CALL_SECONDS,
    MAX_WATCH_SECONDS,
    descriptors,
    routes,
    service_names,
)


def _edge(home: Path, **changes: Any) -> Edge:
    settings: dict[str, Any] = {
        "home": home,
        "listen_address": "127.0.0.1:8080",
        "admin_address": "127.0.0.1:9901",
        "services": {name: [f"127.0.0.1:{7000 + n}"] for n, name in enumerate(CLUSTERS)},
    }
    return Edge(**{**settings, **changes})


def _route(path: str) -> dict[str, Any]:
    (found,) = [route for route in routes() if route["match"].get("path") == path]
    return found


def test_all_placeholders_are_filled_in(tmp_path: Path) -> None:
    """Nothing of the template is left, and all replicas of a service are in it."""
    services = {name: ["127.0.0.1:7001", "10.0.0.2:7002"] for name in CLUSTERS}
    text = render(_edge(tmp_path, services=services)).read_text()
    assert not re.findall(r"\$[a-z_]+\b", text)
    # Six services, and reflection by four of them.
    assert text.count('"port_value": 7002') == len(CLUSTERS) + 4


def test_rendering_again_changes_nothing(tmp_path: Path) -> None:
    """What is rendered depends on the settings alone, so that a restart is no change."""
    before = render(_edge(tmp_path)).read_bytes()
    assert render(_edge(tmp_path)).read_bytes() == before
    assert {path.name for path in config_path(tmp_path).parent.iterdir()} == {
        "envoy.yaml",
        "headrace.pb",
    }


def test_the_configuration_holds_no_private_key(tmp_path: Path) -> None:
    """The edge checks tokens with the public half."""
    text = render(_edge(tmp_path)).read_text()
    assert "edge.pem" not in text
    assert "PRIVATE" not in text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"listen_address": "8080"}, "'8080' is no address"),
        ({"admin_address": "127.0.0.1:http"}, "is no address"),
        ({"services": {"inference": ["127.0.0.1:1"]}}, "needs an address of embedding_cache, reg"),
        ({"otlp_endpoint": "127.0.0.1:4317"}, "http://host:port is needed"),
        ({"otlp_endpoint": "https://127.0.0.1:4317"}, "http://host:port is needed"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    """The message says which setting and what is expected; nothing is written."""
    with pytest.raises(ValueError, match=complaint):
        render(_edge(tmp_path, **changes))
    assert not config_path(tmp_path).exists()


def test_without_an_endpoint_nothing_is_traced(tmp_path: Path) -> None:
    """No exporter that tries in vain, and no work for spans that nobody wants."""
    assert "tracing: null" in render(_edge(tmp_path)).read_text()
    traced = render(_edge(tmp_path, otlp_endpoint="http://127.0.0.1:4317")).read_text()
    assert "headrace-edge" in traced
    assert '"port_value": 4317' in traced


def test_the_command_starts_the_venvs_envoy_apart_from_others(tmp_path: Path) -> None:
    """Two meshes share no memory region and no file."""
    command = argv(_edge(tmp_path))
    assert command[0].endswith("/envoy")
    assert Path(command[0]).exists()
    assert str(config_path(tmp_path)) in command
    assert "--disable-hot-restart" in command


def test_every_call_has_a_longest_duration() -> None:
    """No route lets a stream last for ever, whatever deadline the caller names."""
    for route in routes():
        if "direct_response" in route:
            continue
        limits = route["route"]["max_stream_duration"]
        assert limits["max_stream_duration"] == limits["grpc_timeout_header_max"]
        assert limits["max_stream_duration"] in {f"{MAX_CALL_SECONDS}s", f"{MAX_WATCH_SECONDS}s"}
    generate = _route("/headrace.inference.v1.InferenceService/Generate")
    assert generate["route"]["max_stream_duration"]["max_stream_duration"] == "600s"


@pytest.mark.parametrize(
    ("path", "retry_on"),
    [
        ("headrace.cost.v1.CostService/ListPrices", "…,unavailable"),
        ("headrace.cost.v1.CostService/CreatePrice", "…"),
        ("headrace.jobs.v1.JobService/SubmitJob", "…"),
        ("headrace.inference.v1.InferenceService/Generate", "…"),
        ("headrace.registry.v1.RegistryService/WatchDeployments", "…"),
        ("headrace.registry.v1.RegistryService/UploadArtifact", None),
    ],
)
def test_only_reads_are_retried_after_a_service_has_seen_them(
    path: str, retry_on: str | None
) -> None:
    """Others are sent again only while nothing of them was; uploads never, for want of a copy."""
    policy = _route(f"/{path}")["route"].get("retry_policy")
    unsent = "connect-failure,refused-stream,reset-before-request"
    assert (policy and policy["retry_on"]) == (retry_on and retry_on.replace("…", unsent))


def test_the_descriptors_are_complete() -> None:
    """Each file comes after what it imports, with the types of error details."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors()).file:
        pool.Add(file)
    for name in service_names():
        assert pool.FindServiceByName(name).methods
    assert pool.FindMessageTypeByName("google.rpc.ErrorInfo").fields


def test_the_edges_own_errors_all_name_our_domain() -> None:
    """Each reply for gRPC has details, and those for HTTP are JSON with the same reason."""
    mappers = local_replies()
    for grpc_mapper, openai_mapper, json_mapper in zip(
        mappers[::3], mappers[1::3], mappers[2::3], strict=True
    ):
        headers = {h["header"]["key"]: h["header"]["value"] for h in grpc_mapper["headers_to_add"]}
        assert set(headers) == {"grpc-status", "grpc-message", "grpc-status-details-bin"}
        override = json_mapper["body_format_override"]
        body = override.get("json_format") or json.loads(json_mapper["body"]["inline_string"])
        assert str(body["code"]) == headers["grpc-status"]
        override = openai_mapper["body_format_override"]
        error = override.get("json_format") or json.loads(openai_mapper["body"]["inline_string"])
        assert error["error"]["code"].upper() == body["details"][0]["reason"]
        assert body["details"][0]["domain"] == "headrace"

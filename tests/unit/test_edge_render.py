"""The edge's configuration is complete, has limits, and refuses invalid settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from deploy.envoy.actions import INCOMPLETE
from deploy.envoy.limits import MAX_CHECK_SECONDS, MAX_OPEN_STREAM_SECONDS, Limits
from deploy.envoy.render import CLUSTERS, Edge, argv, files, write, write_tokens
from deploy.envoy.replies import local_replies
from deploy.envoy.routes import (
    LIMITED_CLUSTERS,
    MAX_CALL_SECONDS,
    MAX_WATCH_SECONDS,
    descriptors,
    routes,
    service_names,
)
from deploy.host import PROGRAMS

_JWKS = '{"keys": ["a key"]}'


@pytest.fixture(autouse=True, scope="module")
def jwks_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The public keys that the edges of these tests verify tokens with."""
    path: Path = tmp_path_factory.mktemp("keys") / "jwks.json"
    path.write_text(_JWKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_KEYS, "jwks_file", path)
        yield path


_KEYS: dict[str, Path] = {}


def _edge(folder: Path, **changes: Any) -> Edge:
    settings: dict[str, Any] = {
        "folder": folder,
        "jwt_issuer": "issuer",
        "jwt_audience": "audience",
        "listen_address": "127.0.0.1:8080",
        "admin_address": "unix:/run/envoy.admin",
        "metrics_address": "127.0.0.1:9901",
        "services": {name: [f"127.0.0.1:{7000 + n}"] for n, name in enumerate(CLUSTERS)},
    }
    return Edge(**{**settings, **_KEYS, **changes})


def _route(path: str) -> dict[str, Any]:
    """Returns the route of a call whose request is complete."""
    (found,) = [
        route
        for route in routes(Limits())
        if route["match"].get("path") == path and route.get("name") != INCOMPLETE
    ]
    return found


def test_all_placeholders_are_replaced(tmp_path: Path) -> None:
    """No placeholder is left, and all replicas of a service are in the configuration."""
    services = {name: ["127.0.0.1:7001", "10.0.0.2:7002"] for name in CLUSTERS}
    text = write(_edge(tmp_path, services=services)).read_text()
    assert not re.findall(r"\$[a-z_]+\b", text)
    # Each cluster, those with limits of their own, and reflection by four services.
    assert text.count('"port_value": 7002') == len(CLUSTERS) + len(LIMITED_CLUSTERS) + 4


def test_rendering_again_changes_nothing(tmp_path: Path) -> None:
    """The files depend on the settings only, so a restart does not change them."""
    before = write(_edge(tmp_path)).read_bytes()
    assert write(_edge(tmp_path)).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "envoy.yaml",
        "headrace.pb",
        "tokens.json",
    }


def test_tokens_are_verified_with_the_public_keys_that_are_given(tmp_path: Path) -> None:
    """A file of its own has them, the issuer and the audience."""
    text = write(_edge(tmp_path)).read_text()
    assert f'"path": "{tmp_path}/tokens.json"' in text
    (resource,) = json.loads((tmp_path / "tokens.json").read_bytes())["resources"]
    (provider,) = resource["typed_config"]["providers"].values()
    assert provider["issuer"] == "issuer"
    assert provider["audiences"] == ["audience"]
    assert provider["local_jwks"] == {"inline_string": _JWKS}


def test_tokens_are_verified_with_other_keys_while_the_edge_runs(
    tmp_path: Path, jwks_file: Path
) -> None:
    """Only their file is written again, with another version."""
    edge = _edge(tmp_path)
    write(edge)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    jwks_file.write_text('{"keys": []}')
    write_tokens(edge)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"tokens.json"}
    versions = [json.loads(files["tokens.json"])["version_info"] for files in (before, after)]
    assert versions[0] != versions[1]
    jwks_file.write_text(_JWKS)


def test_files_can_be_rendered_for_another_machine() -> None:
    """The folder that Envoy will read them from need not exist here."""
    rendered = files(_edge(Path("/etc/envoy")))
    assert b'"/etc/envoy/headrace.pb"' in rendered["envoy.yaml"]
    assert not Path("/etc/envoy").exists()


def test_rendering_needs_nothing_of_a_local_mesh() -> None:
    """Compose and Kubernetes render the same configuration."""
    script = "import sys, deploy.envoy.render; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not [name for name in loaded if name in ("deploy.local", "deploy.keys", "supervisor")]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"listen_address": "8080"}, "invalid address '8080'; use host:port"),
        ({"admin_address": "127.0.0.1:http"}, "invalid address"),
        ({"metrics_address": "9901"}, "invalid address"),
        ({"services": {"inference": ["127.0.0.1:1"]}}, "needs an address of embedding_cache, reg"),
        ({"otlp_endpoint": "127.0.0.1:4317"}, "must be http://host:port"),
        ({"otlp_endpoint": "https://127.0.0.1:4317"}, "must be http://host:port"),
    ],
)
def test_invalid_settings_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    """The message says which setting and what is expected; nothing is written."""
    with pytest.raises(ValueError, match=complaint):
        write(_edge(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_without_an_endpoint_nothing_is_traced(tmp_path: Path) -> None:
    """No exporter that cannot connect, and no work for unused spans."""
    assert "tracing: null" in write(_edge(tmp_path)).read_text()
    traced = write(_edge(tmp_path, otlp_endpoint="http://127.0.0.1:4317")).read_text()
    assert "headrace-edge" in traced
    assert '"port_value": 4317' in traced


def test_the_command_separates_the_edges_of_two_meshes(tmp_path: Path) -> None:
    """They share no memory region and no file."""
    command = argv(_edge(tmp_path), program=str(PROGRAMS / "envoy"))
    assert Path(command[0]).exists()
    assert str(tmp_path / "envoy.yaml") in command
    assert "--disable-hot-restart" in command


def test_every_call_has_a_maximum_duration() -> None:
    """No route allows an endless stream, whatever deadline the caller sets."""
    for route in routes(Limits()):
        if "direct_response" in route or route.get("name") == INCOMPLETE:
            continue
        limits = route["route"]["max_stream_duration"]
        assert limits["max_stream_duration"] == limits["grpc_timeout_header_max"]
        assert limits["max_stream_duration"] in {
            f"{seconds}s"
            for seconds in (
                MAX_CALL_SECONDS,
                MAX_WATCH_SECONDS,
                MAX_CHECK_SECONDS,
                MAX_OPEN_STREAM_SECONDS,
            )
        }
    generate = _route("/headrace.inference.v1.InferenceService/Generate")
    assert generate["route"]["max_stream_duration"]["max_stream_duration"] == "600s"


def test_only_streams_of_requests_are_forwarded_before_they_are_complete() -> None:
    """Every other call is kept by the edge, under the timeouts for bodies, until it is complete."""
    every = routes(Limits(body_idle_seconds=7))
    incomplete = {
        r["match"]["path"]: r for r in every if r.get("name") == INCOMPLETE and "path" in r["match"]
    }
    streaming = {
        route["match"]["path"]
        for route in every
        if "route" in route
        and "path" in route["match"]
        and route["match"]["path"] not in incomplete
    }
    assert streaming == {
        "/headrace.registry.v1.RegistryService/UploadArtifact",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
    for route in incomplete.values():
        assert route["route"]["idle_timeout"] == "7s"
        # It would overwrite the caller's deadline; the one of the listener applies.
        assert "max_stream_duration" not in route["route"]


@pytest.mark.parametrize(
    ("path", "retry_on"),
    [
        ("headrace.cost.v1.CostService/ListPrices", "…,unavailable"),
        ("headrace.cost.v1.CostService/CreatePrice", "…"),
        ("headrace.jobs.v1.JobService/SubmitJob", "…"),
        ("headrace.inference.v1.InferenceService/Generate", "…"),
        ("headrace.jobs.v1.JobService/WatchJob", "…"),
        ("headrace.registry.v1.RegistryService/UploadArtifact", None),
    ],
)
def test_only_reads_are_retried_after_a_service_has_seen_them(
    path: str, retry_on: str | None
) -> None:
    """Others are retried only if nothing was sent; uploads never, since they are not buffered."""
    policy = _route(f"/{path}")["route"].get("retry_policy")
    unsent = "connect-failure,refused-stream,reset-before-request"
    assert (policy and policy["retry_on"]) == (retry_on and retry_on.replace("…", unsent))


def test_the_descriptors_are_complete() -> None:
    """Each file comes after its imports, and the types of error details are included."""
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

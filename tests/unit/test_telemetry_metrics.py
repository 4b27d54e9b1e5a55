"""Metrics by the names that dashboards and alerts know."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from prometheus_client import REGISTRY

from libs.telemetry import genai, rpc_metrics
from libs.telemetry.metrics import serve_metrics


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def model_labels(version: str) -> dict[str, str]:
    return {
        "gen_ai_operation_name": "chat",
        "gen_ai_request_model": "smollm2",
        "gen_ai_response_model": version,
    }


def test_metrics_are_served_until_closed() -> None:
    """Port 0 chooses a free port and returns it; after `close` it is free again."""
    endpoint = serve_metrics("127.0.0.1:0")
    with urllib.request.urlopen(f"http://{endpoint.address}/metrics") as answer:
        body = answer.read().decode()
    endpoint.close()
    assert "process_resident_memory_bytes" in body
    assert "gen_ai_server_request_duration_seconds" in body
    assert "_created" not in body
    host, _, port = endpoint.address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))


def test_an_address_that_is_taken_is_an_error() -> None:
    """Two processes never share a metrics port in silence."""
    endpoint = serve_metrics("127.0.0.1:0")
    with pytest.raises(OSError, match="in use"):
        serve_metrics(endpoint.address)
    endpoint.close()


def test_calls_are_counted_by_the_names_of_a66() -> None:
    """The method has no leading slash, the status is the code's name."""
    rpc_metrics.started("/headrace.test.v1.Test/Do")
    rpc_metrics.started("/headrace.test.v1.Test/Do")
    rpc_metrics.handled("/headrace.test.v1.Test/Do", "NOT_FOUND", 0.0042)
    method = "headrace.test.v1.Test/Do"
    assert value("grpc_server_call_started_total", grpc_method=method) == 2
    labels = {"grpc_method": method, "grpc_status": "NOT_FOUND"}
    assert value("grpc_server_call_duration_seconds_count", **labels) == 1
    assert value("grpc_server_call_duration_seconds_sum", **labels) == pytest.approx(0.0042)
    assert value("grpc_server_call_duration_seconds_bucket", le="0.004", **labels) == 0
    assert value("grpc_server_call_duration_seconds_bucket", le="0.005", **labels) == 1


def test_a_generation_is_observed_in_three_histograms() -> None:
    """Request, first token, and the mean time of the tokens after the first."""
    genai.observe(
        operation="chat", model="smollm2", model_version="v1",
        duration_seconds=1.25, first_token_seconds=0.25, output_tokens=11,
    )  # fmt: skip
    labels = model_labels("v1")
    assert value("gen_ai_server_request_duration_seconds_sum", error_type="", **labels) == 1.25
    assert value("gen_ai_server_time_to_first_token_seconds_sum", **labels) == 0.25
    per_token = value("gen_ai_server_time_per_output_token_seconds_sum", **labels)
    assert per_token == pytest.approx(0.1)


@pytest.mark.parametrize("first_token_seconds", [None, 0.5])
def test_what_did_not_happen_is_not_observed(first_token_seconds: float | None) -> None:
    """No token, no first token; one token, no time between tokens."""
    version = f"v2-{first_token_seconds}"
    genai.observe(
        operation="chat", model="smollm2", model_version=version, error_type="BACKEND_FAILED",
        duration_seconds=1.0, first_token_seconds=first_token_seconds,
        output_tokens=0 if first_token_seconds is None else 1,
    )  # fmt: skip
    labels = model_labels(version)
    failed = "gen_ai_server_request_duration_seconds_count"
    assert value(failed, error_type="BACKEND_FAILED", **labels) == 1
    firsts = value("gen_ai_server_time_to_first_token_seconds_count", **labels)
    assert firsts == (first_token_seconds is not None)
    assert value("gen_ai_server_time_per_output_token_seconds_count", **labels) == 0


def test_prepared_metrics_are_the_same_series() -> None:
    """The hot path holds its children and looks nothing up."""
    prepared = genai.ModelMetrics(operation="chat", model="smollm2", model_version="v3")
    prepared.time_to_first_token.observe(0.5)
    prepared.observe_request(2.0)
    genai.observe(operation="chat", model="smollm2", model_version="v3", duration_seconds=1.0)
    labels = model_labels("v3")
    assert value("gen_ai_server_time_to_first_token_seconds_count", **labels) == 1
    assert value("gen_ai_server_request_duration_seconds_sum", error_type="", **labels) == 3.0

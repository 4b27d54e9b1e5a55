"""TLS of the edge: where it reads its certificate, and what it demands of callers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SDS_FILE = "edge-certificate.json"
HANDSHAKE_SECONDS = 10
_SDS_NAME = "edge-certificate"


@dataclass(frozen=True, kw_only=True)
class Tls:
    """The certificate that callers see.

    Attributes:
        certificate_file: the absolute path of the chain, PEM, the edge's own certificate first.
        key_file: the absolute path of its private key, PEM.
        hsts_seconds: for how long browsers must refuse to call without TLS; 0: no header.
    """

    certificate_file: Path
    key_file: Path
    hsts_seconds: int = 31_536_000


def certificate_source(tls: Tls) -> bytes:
    """Returns the file that names the certificate, for Envoy to read and watch.

    Envoy reads the certificate again when a file is moved into its folder, as tools for
    certificates and Kubernetes do; see `docs/guides/edge.md`.
    """
    certificate = {
        "certificate_chain": {"filename": str(tls.certificate_file)},
        "private_key": {"filename": str(tls.key_file)},
        "watched_directory": {"path": str(tls.certificate_file.parent)},
    }
    resource = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": _SDS_NAME,
        "tls_certificate": certificate,
    }
    return json.dumps({"resources": [resource]}, indent=1).encode()


def listener_socket(folder: Path) -> dict[str, Any]:
    """Returns the part of the listener that speaks TLS.

    Args:
        folder: where the file `SDS_FILE` is.
    """
    context = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
        ".DownstreamTlsContext",
        "common_tls_context": {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificate_sds_secret_configs": [
                {
                    "name": _SDS_NAME,
                    "sds_config": {
                        "path_config_source": {"path": str(folder / SDS_FILE)},
                        "resource_api_version": "V3",
                    },
                }
            ],
        },
    }
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}


def response_headers(tls: Tls | None) -> list[dict[str, Any]]:
    """Returns the mutations of every response."""
    if tls is None or not tls.hsts_seconds:
        return []
    header = {"key": "strict-transport-security", "value": f"max-age={tls.hsts_seconds}"}
    return [{"append": {"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}]

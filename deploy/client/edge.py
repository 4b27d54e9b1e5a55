"""A channel to the edge with a token, and what the errors of its calls say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_DETAILS_KEY = "grpc-status-details-bin"
# What gRPC itself says, with the address that it tried last.
_UNREACHABLE = re.compile(r"failed to connect to all addresses.*ipv[46]:(?P<address>\S+?): ")


class EdgeClient:
    """A channel to the edge of a mesh and the metadata of its calls. Use it in a `with`.

    Attributes:
        address: the edge's `host:port`.
        channel: a synchronous channel to it.
        metadata: the token; pass it to every call.
    """

    def __init__(self, address: str, *, token: str, certificate: str = "") -> None:
        """Opens the channel.

        Args:
            address: the edge's `host:port`.
            token: the token of all calls.
            certificate: the edge's own certificate, PEM; no other is trusted. Empty: without TLS.
        """
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        if certificate:
            self.channel = grpc.secure_channel(
                address,
                grpc.ssl_channel_credentials(certificate.encode()),
                # The certificate is for the name that callers on the network use.
                options=[*options, ("grpc.ssl_target_name_override", server_name(certificate))],
            )
        else:
            self.channel = grpc.insecure_channel(address, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.channel.close()


def server_name(certificate: str) -> str:
    """Returns a name that a certificate is for: of a host, or an IP address.

    Raises:
        ValueError: it is not a certificate, or has no such name.
    """
    from cryptography import x509  # noqa: PLC0415 - only where the edge has TLS

    loaded = x509.load_pem_x509_certificate(certificate.encode())
    try:
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = None
    for host in names.get_values_for_type(x509.DNSName) if names else ():
        return str(host).replace("*", "edge", 1)
    for ip in names.get_values_for_type(x509.IPAddress) if names else ():
        return str(ip)
    raise ValueError("the edge's certificate has no alternative name, so that no client accepts it")


def retry_seconds(error: grpc.RpcError) -> float | None:
    """Returns how long to wait before the next try; None if the server asks for none."""
    retry = error_details_pb2.RetryInfo()
    if any(detail.Unpack(retry) for detail in _details(error)):
        return float(retry.retry_delay.ToTimedelta().total_seconds())
    return None


def describe(error: grpc.RpcError) -> str:
    """Returns the code, message, violations and reason of a failed RPC in one line."""
    if address := unreachable_address(error):
        return (
            f"{error.code().name}: nothing answers at {address}; `headrace status` shows what runs,"
            " `headrace up` starts it"
        )
    info = error_details_pb2.ErrorInfo()
    text = _with_violations(error)
    if not any(detail.Unpack(info) for detail in _details(error)):
        return f"{error.code().name}: {text}"
    known = f"; available: {models}" if (models := info.metadata.get("models")) else ""
    return f"{error.code().name}: {text}{known} ({info.reason})"


def unreachable_address(error: grpc.RpcError) -> str:
    """Returns the address if no server answers there at all; empty for every other error."""
    if error.code() is not grpc.StatusCode.UNAVAILABLE or _details(error):
        return ""
    found = _UNREACHABLE.search(error.details() or "")
    return found["address"] if found else ""


def _with_violations(error: grpc.RpcError) -> str:
    """Returns the message, and what is wrong with fields where the message does not say it."""
    text = error.details() or ""
    request = error_details_pb2.BadRequest()
    for detail in _details(error):
        if detail.Unpack(request):
            for violation in request.field_violations:
                if violation.description not in text:
                    text = f"{text}; {violation.field}: {violation.description}"
    return text


def _details(error: grpc.RpcError) -> Sequence[any_pb2.Any]:
    for entry in error.trailing_metadata() or ():
        if entry.key == _DETAILS_KEY and isinstance(entry.value, bytes):
            return tuple(status_pb2.Status.FromString(entry.value).details)
    return ()

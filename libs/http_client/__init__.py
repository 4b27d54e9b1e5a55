"""A client of HTTP/1.1 for calls to servers outside the mesh, which reads responses as they come.

Others use `HttpClient`, `HttpError`, `Response`, and `Network` with `Proxies` and `AddressPolicy`,
which define how servers are reached, and `Url`; all are here. The modules are internal.
"""

from __future__ import annotations

from libs.http_client.addresses import AddressPolicy, AddressRefusedError
from libs.http_client.client import HttpClient
from libs.http_client.connector import Network
from libs.http_client.proxies import Proxies
from libs.http_client.response import HttpError, Response
from libs.http_client.urls import Url

__all__ = [
    "AddressPolicy",
    "AddressRefusedError",
    "HttpClient",
    "HttpError",
    "Network",
    "Proxies",
    "Response",
    "Url",
]

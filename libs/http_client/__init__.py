"""A client of HTTP/1.1 for calls to servers outside the mesh, which reads responses as they come.

Others use `HttpClient`, `HttpError`, `Response`, and `Network` with `Proxies`, which define how
servers are reached; all are here. The modules are internal.
"""

from __future__ import annotations

from libs.http_client.client import HttpClient
from libs.http_client.connector import Network
from libs.http_client.proxies import Proxies
from libs.http_client.response import HttpError, Response

__all__ = ["HttpClient", "HttpError", "Network", "Proxies", "Response"]

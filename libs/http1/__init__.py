"""An HTTP/1.1 server: connections, requests and the ways to answer them; nothing of what is served.

An `Application` answers each `Exchange`; `HttpServer` listens, keeps the connections and drains
them when it stops. Others use only these names.
"""

from __future__ import annotations

from libs.http1.arrival import ArrivalLimits
from libs.http1.connection import Application
from libs.http1.exchange import CLIENT_CLOSED_REQUEST, Exchange
from libs.http1.request import Request
from libs.http1.server import HttpServer

__all__ = [
    "CLIENT_CLOSED_REQUEST",
    "Application",
    "ArrivalLimits",
    "Exchange",
    "HttpServer",
    "Request",
]

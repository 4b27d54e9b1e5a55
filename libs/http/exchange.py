"""One request and the way to answer it."""

from __future__ import annotations

from aiohttp import web

from libs.rpc.identity import Identity, identity_in

# Nobody sees it: the caller did not wait for the answer.
CALLER_GONE = 499


def has_gone(request: web.BaseRequest) -> bool:
    """Tells whether the caller closed its connection: a write may notice before we are told."""
    return request.transport is None or request.transport.is_closing()


class Exchange:
    """What a handler gets: the body, who asks, and two ways to answer, of which it takes one.

    Attributes:
        body: all of it.
        response: what was answered so far; None: nothing.
    """

    def __init__(self, request: web.BaseRequest, body: bytes) -> None:
        self.body = body
        self.response: web.StreamResponse | None = None
        self._request = request

    @property
    def identity(self) -> Identity:
        """The caller.

        Raises:
            Unauthenticated: the headers name none; the request did not come through the edge.
        """
        return identity_in(self._request.headers)

    def whole(self, body: bytes, *, content_type: str) -> None:
        """Answers with one body."""
        self.response = web.Response(body=body, headers={"Content-Type": content_type})

    async def part(self, data: bytes, *, content_type: str) -> None:
        """Answers with a part of a body, more of which may follow; waits while its reader lags."""
        response = self.response
        if response is None:
            response = web.StreamResponse(headers={"Content-Type": content_type})
            self.response = response
            await response.prepare(self._request)
        await response.write(data)

    def cut(self) -> None:
        """Ends the connection: whoever does not read cannot be told anything."""
        if self._request.transport is not None:
            self._request.transport.abort()

"""The library `h2`, set up for a gRPC client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hpack
from h2.config import H2Configuration
from h2.connection import (
    ConnectionInputs,
    ConnectionState,
    H2Connection,
    H2ConnectionStateMachine,
)
from h2.events import Event
from h2.settings import SettingCodes, Settings
from hpack.exceptions import OversizedHeaderListError
from hpack.hpack import encode_integer
from hyperframe.frame import DataFrame, Frame
from typing_extensions import override

# The largest header list that a response may have, as SETTINGS_MAX_HEADER_LIST_SIZE counts it.
MAX_HEADER_LIST_BYTES = 64 * 1024
# A larger list ends its own stream only, because it is still decoded: later headers depend on the
# state of the HPACK decoder. Decoding takes quadratic time, so that the connection ends where a
# header block or its list is larger than this.
MAX_DECODED_HEADER_BYTES = 128 * 1024


class ClientProtocol(H2Connection):
    """The protocol state of one client connection.

    Header validation is off in both directions. `h2` ends the connection, and with it all streams,
    for faults such as a trailing space in `grpc-message`, which gRPC servers do send.
    """

    def __init__(self) -> None:
        super().__init__(
            H2Configuration(
                client_side=True,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.state_machine = _DrainingStateMachine()
        self.encoder = _LiteralEncoder()
        self.decoder = _BoundedDecoder(max_header_list_size=MAX_DECODED_HEADER_BYTES)
        self.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.MAX_CONCURRENT_STREAMS: 1,  # servers open no streams
                SettingCodes.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_BYTES,
            },
        )

    @property
    def is_closed(self) -> bool:
        """Whether a GOAWAY was queued: nothing else can be sent or received."""
        return self.state_machine.state is ConnectionState.CLOSED

    def is_open(self, stream_id: int) -> bool:
        """Whether a stream can still be sent on.

        `h2` processes all frames of a read before the caller sees the first event: a stream may
        have ended while the events of its earlier frames are still to be handled.
        """
        stream = self.streams.get(stream_id)
        return stream is not None and stream.open

    @override
    def _receive_frame(self, frame: Frame) -> list[Event]:
        """Receives a DATA frame without making the text for the log, a third of its cost."""
        if frame.__class__ is not DataFrame:
            return super()._receive_frame(frame)
        frames, events = self._receive_data_frame(frame)
        self._prepare_for_sending(frames)
        return events

    @override
    def clear_outbound_data_buffer(self) -> None:
        """Keeps the data. `h2` calls this for a GOAWAY, after which streams continue."""


class _DrainingStateMachine(H2ConnectionStateMachine):
    """Keeps the connection open after a GOAWAY, until its streams have ended (RFC 9113, 6.8)."""

    _transitions = H2ConnectionStateMachine._transitions | {  # noqa: SLF001  # no public setting
        (ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY): (
            None,
            ConnectionState.CLIENT_OPEN,
        )
    }


class _BoundedDecoder(hpack.Decoder):
    """Refuses large blocks before it spends time on them; `h2` accepts up to 1 MiB."""

    @override
    def decode(self, data: bytes, raw: bool = False) -> Iterable[hpack.HeaderTuple]:
        if len(data) > MAX_DECODED_HEADER_BYTES:
            raise OversizedHeaderListError(f"a header block has {len(data)} bytes")
        return super().decode(data, raw=raw)


class _LiteralEncoder(hpack.Encoder):
    """Writes each field as it is, into no table (RFC 7541, 6.2.2).

    On a short path the bytes cost less than the time to compress them.
    """

    @override
    def encode(self, headers: Iterable[Any] | dict[Any, Any], huffman: bool = False) -> bytes:
        return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def _string(raw: bytes) -> bytes:
    return bytes(encode_integer(len(raw), 7)) + raw

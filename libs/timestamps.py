"""Times in protos."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp


def to_timestamp(moment: datetime) -> Timestamp:
    """Returns a time as protos carry it."""
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp

"""The API's paths, and what all of its objects share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import orjson

CHAT_COMPLETIONS_PATH = "/v1/chat/completions"
EMBEDDINGS_PATH = "/v1/embeddings"
MODELS_PATH = "/v1/models"
JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream"

Json = Mapping[str, object]

# JSON in UTF-8, without spaces.
to_json = orjson.dumps


@dataclass(frozen=True)
class Served:
    """What Headrace adds to OpenAI's fields: the member `headrace`, which clients ignore."""

    model_version: str
    artifact_digest: str
    deployment: str
    route_reason: str
    cost_nano_usd: int
    request_id: str
    trace_id: str

    def to_json_object(self) -> Json:
        """Returns the member's value."""
        return vars(self)

    @property
    def fingerprint(self) -> str:
        """The `system_fingerprint`: equal as long as the same artifact answers."""
        return f"fp_{self.artifact_digest.removeprefix('sha256:')[:12]}"


def model_object(model: str, *, created_seconds: int = 0, owner: str = "headrace") -> Json:
    """Returns a `model`; `created_seconds` is Unix time."""
    return {"id": model, "object": "model", "created": created_seconds, "owned_by": owner}


def list_object(items: Iterable[Json]) -> dict[str, object]:
    """Returns a `list` of OpenAI's objects."""
    return {"object": "list", "data": list(items)}

"""The errors of Headrace's models on Triton, and of Triton itself where it runs them."""

from __future__ import annotations

import json
from typing import Any

from libs.errors import BY_CODE, HeadraceError
from services.inference.domain import BackendFailedError

# The reasons that a model may give, with their status codes. All others are the backend's fault.
_CODES = {"PROMPT_TOO_LONG": "INVALID_ARGUMENT", "INVALID_FIELD": "INVALID_ARGUMENT"}
_FIELDS = {"PROMPT_TOO_LONG": "messages"}


def error_of_model(message: str) -> HeadraceError | BackendFailedError:
    """Reads an error: a model's is JSON with a reason; any other text is the backend's fault."""
    fields = _object(message[message.find("{") :]) if "{" in message else {}
    reason = fields.get("reason")
    if not isinstance(reason, str) or reason not in _CODES:
        return BackendFailedError(message)
    text = str(fields.get("message") or reason)
    details = fields.get("metadata")
    metadata = (
        {str(key): str(value) for key, value in details.items()}
        if isinstance(details, dict)
        else {}
    )
    field = metadata.get("field", _FIELDS.get(reason, ""))
    return BY_CODE[_CODES[reason]](
        text, reason=reason, metadata=metadata, field_violations=[(field, text)]
    )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}

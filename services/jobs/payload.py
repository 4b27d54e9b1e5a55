"""What may be asked for. The model may have stricter rules; then the job fails and says why."""

from __future__ import annotations

from headrace.embedding.v1 import embedding_pb2
from headrace.inference.v1 import inference_pb2
from headrace.jobs.v1 import jobs_pb2

from libs.errors import InvalidArgument
from libs.ids import check_uuid

ROLES = frozenset({"system", "user", "assistant"})
MAX_MESSAGES = 1024
MAX_STOPS = 4
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 2.0
MAX_TEXTS = 2048

_Violations = list[tuple[str, str]]


def checked_payload(payload: jobs_pb2.JobPayload, job_id: str) -> jobs_pb2.JobPayload:
    """Returns a payload that can be run, its `request_id` filled in.

    Raises:
        InvalidArgument: with every field that is wrong.
    """
    match payload.WhichOneof("work"):
        case "generate":
            wrong = _wrong_generate(payload.generate)
        case "embed":
            wrong = _wrong_embed(payload.embed)
        case _:
            wrong = [("payload", "must have one of generate and embed")]
    if wrong:
        raise InvalidArgument.of_fields(wrong)
    checked = jobs_pb2.JobPayload()
    checked.CopyFrom(payload)
    work = checked.generate if checked.HasField("generate") else checked.embed
    work.request_id = work.request_id or job_id
    return checked


def _wrong_generate(request: inference_pb2.GenerateRequest) -> _Violations:
    wrong = _wrong_common("payload.generate", request.request_id, request.model)
    if not 0 < len(request.messages) <= MAX_MESSAGES:
        wrong.append(("payload.generate.messages", f"must have 1 to {MAX_MESSAGES} messages"))
    else:
        wrong += [
            (f"payload.generate.messages[{index}].role", "must be system, user or assistant")
            for index, message in enumerate(request.messages)
            if message.role not in ROLES
        ]
    return [*wrong, *_wrong_sampling(request), *_wrong_stops(request)]


def _wrong_sampling(request: inference_pb2.GenerateRequest) -> _Violations:
    wrong = []
    if request.HasField("max_tokens") and request.max_tokens < 1:
        wrong.append(("payload.generate.max_tokens", "must be at least 1"))
    if request.HasField("temperature") and not 0 <= request.temperature <= MAX_TEMPERATURE:
        wrong.append(("payload.generate.temperature", "must be from 0 to 2"))
    if request.HasField("top_p") and not 0 < request.top_p <= 1:
        wrong.append(("payload.generate.top_p", "must be above 0 and at most 1"))
    if request.HasField("seed") and request.seed < 0:
        wrong.append(("payload.generate.seed", "must not be negative"))
    return wrong


def _wrong_stops(request: inference_pb2.GenerateRequest) -> _Violations:
    if len(request.stop) > MAX_STOPS:
        return [("payload.generate.stop", f"must have at most {MAX_STOPS} entries")]
    return [
        (f"payload.generate.stop[{index}]", f"must have 1 to {MAX_STOP_BYTES} bytes")
        for index, text in enumerate(request.stop)
        if not 0 < len(text.encode()) <= MAX_STOP_BYTES
    ]


def _wrong_embed(request: embedding_pb2.EmbedRequest) -> _Violations:
    wrong = _wrong_common("payload.embed", request.request_id, request.model)
    if not 0 < len(request.texts) <= MAX_TEXTS:
        return [*wrong, ("payload.embed.texts", f"must have 1 to {MAX_TEXTS} texts")]
    empty = [index for index, text in enumerate(request.texts) if not text]
    if empty:
        wrong.append((f"payload.embed.texts[{empty[0]}]", "must not be empty"))
    return wrong


def _wrong_common(path: str, request_id: str, model: str) -> _Violations:
    wrong = [] if model else [(f"{path}.model", "must name a model")]
    if request_id:
        try:
            check_uuid(request_id, field=f"{path}.request_id")
        except InvalidArgument as error:
            wrong += error.field_violations
    return wrong

"""What a job may ask for. The model may have stricter rules; then the job fails and says why."""

from __future__ import annotations

from headrace.embedding.v1 import embedding_pb2
from headrace.jobs.v1 import jobs_pb2

from libs.chat.request import Violations
from libs.chat.wire import generation_request
from libs.errors import InvalidArgument
from libs.ids import check_uuid

MAX_TEXTS = 2048


def checked_payload(payload: jobs_pb2.JobPayload, job_id: str) -> jobs_pb2.JobPayload:
    """Returns a payload that can be run, its `request_id` filled in.

    Raises:
        InvalidArgument: with every field that is wrong.
    """
    match payload.WhichOneof("work"):
        case "generate":
            wrong = generation_request(payload.generate).violations()
            wrong = [(f"payload.generate.{field}", text) for field, text in wrong]
        case "embed":
            wrong = _embed_violations(payload.embed)
        case _:
            wrong = [("payload", "must have one of generate and embed")]
    if wrong:
        raise InvalidArgument.of_fields(wrong)
    checked = jobs_pb2.JobPayload()
    checked.CopyFrom(payload)
    work = checked.generate if checked.HasField("generate") else checked.embed
    work.request_id = work.request_id or job_id
    return checked


def _embed_violations(request: embedding_pb2.EmbedRequest) -> Violations:
    wrong: Violations = []
    if request.request_id:
        try:
            check_uuid(request.request_id, field="payload.embed.request_id")
        except InvalidArgument as error:
            wrong += error.field_violations
    if not request.model:
        wrong.append(("payload.embed.model", "must name a model"))
    if not 0 < len(request.texts) <= MAX_TEXTS:
        return [*wrong, ("payload.embed.texts", f"must have 1 to {MAX_TEXTS} texts")]
    empty = [index for index, text in enumerate(request.texts) if not text]
    if empty:
        wrong.append((f"payload.embed.texts[{empty[0]}]", "must not be empty"))
    return wrong

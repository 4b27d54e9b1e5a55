"""Answers and conversations over a real channel, with a scripted service."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from headrace.inference.v1 import inference_pb2, inference_pb2_grpc

from deploy.client.answers import stream_answer
from deploy.client.conversation import HISTORY_MESSAGES, Conversation
from deploy.client.edge import EdgeClient


class _Model(inference_pb2_grpc.InferenceServiceServicer):
    """Answers `one two`, or fails with the next of `failures`."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.failures: list[status_pb2.Status] = []

    def Generate(self, request, context):
        self.requests.append(request)
        if self.failures:
            context.abort_with_status(rpc_status.to_status(self.failures.pop()))
        yield inference_pb2.GenerateResponse()  # an event that this client does not know
        for text in ("one ", "two"):
            yield inference_pb2.GenerateResponse(
                delta=inference_pb2.Delta(text=text, token_count=1)
            )
        yield inference_pb2.GenerateResponse(final=inference_pb2.Final(request_id="r"))


@pytest.fixture
def model() -> _Model:
    return _Model()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED


@pytest.fixture
def edge(model: _Model) -> Iterator[EdgeClient]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with EdgeClient(f"127.0.0.1:{port}", token=str(port)) as client:
        yield client
    server.stop(None).wait()


def _failure(*details: error_details_pb2.RetryInfo) -> status_pb2.Status:
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE, message="loading")
    for detail in details:
        status.details.add().Pack(detail)
    return status


def test_an_answer_is_streamed_and_returned(edge: EdgeClient):
    """Text arrives in chunks; events that the client does not know are skipped."""
    texts: list[str] = []

    answer = stream_answer(edge, inference_pb2.GenerateRequest(model="m"), texts.append)

    assert texts == ["one ", "two"]
    assert (answer.text, answer.final.request_id) == ("one two", "r")


def test_a_model_that_is_not_ready_is_called_again(edge: EdgeClient, model: _Model):
    """Only if the answer says when; otherwise the user gets the error."""
    soon = error_details_pb2.RetryInfo(retry_delay=Duration(nanos=1_000_000))
    model.failures = [_failure(soon), _failure(soon)]
    request = inference_pb2.GenerateRequest(model="m")

    assert stream_answer(edge, request, lambda text: None).text == "one two"
    assert len(model.requests) == 3

    model.failures = [_failure()]
    with pytest.raises(grpc.RpcError):
        stream_answer(edge, request, lambda text: None)
    assert len(model.requests) == 4


def test_a_question_is_sent_with_the_messages_before_it(edge: EdgeClient, model: _Model):
    """A failed question is left out, and only the latest messages are sent."""
    conversation = Conversation(edge, model="m", max_tokens=8, temperature=0.0)
    conversation.ask("first", lambda text: None)
    model.failures = [_failure()]
    with pytest.raises(grpc.RpcError):
        conversation.ask("failed", lambda text: None)

    for number in range(HISTORY_MESSAGES):
        conversation.ask(str(number), lambda text: None)

    second, last = model.requests[2], model.requests[-1]
    assert [message.role for message in second.messages] == [
        inference_pb2.ROLE_USER,
        inference_pb2.ROLE_ASSISTANT,
        inference_pb2.ROLE_USER,
    ]
    assert [message.parts[0].text for message in second.messages] == ["first", "one two", "0"]
    assert len(last.messages) == HISTORY_MESSAGES
    assert last.messages[-1].parts[0].text == str(HISTORY_MESSAGES - 1)

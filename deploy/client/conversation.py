"""A conversation with a model: each question is sent with the messages before it."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from headrace.common.v1 import model_pb2
from headrace.inference.v1 import inference_pb2
from headrace.router.v1 import router_pb2, router_pb2_grpc

from deploy.client.answers import Answer, stream_answer
from deploy.client.edge import EdgeClient, describe, unreachable_address
from deploy.client.registry import Registry
from deploy.errors import CliError
from libs.chat.wire import text_message

# Older messages are left out, so that the prompt does not outgrow a small model's context.
HISTORY_MESSAGES = 12
CHECK_SECONDS = 5.0
# What says that the model cannot be called. After other errors, the call itself may succeed.
_WRONG_MODEL = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


class Conversation:
    """Keeps the messages of a conversation. A question that fails is not kept.

    Attributes:
        model: the one that answers the next question.
    """

    def __init__(
        self, edge: EdgeClient, *, model: str, max_tokens: int, temperature: float
    ) -> None:
        self._edge = edge
        self.model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[inference_pb2.Message] = []

    def reset(self) -> None:
        """Forgets the messages."""
        self._messages = []

    def ask(self, question: str, on_text: Callable[[str], None]) -> Answer:
        """Streams the answer to a question.

        Raises:
            grpc.RpcError: see `stream_answer`.
            KeyboardInterrupt: the user stopped the answer; what arrived until then is kept.
        """
        messages = [*self._messages, text_message(inference_pb2.ROLE_USER, question)]
        request = inference_pb2.GenerateRequest(
            model=self.model,
            messages=messages[-HISTORY_MESSAGES:],
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        )
        texts: list[str] = []

        def receive(text: str) -> None:
            texts.append(text)
            on_text(text)

        try:
            answer = stream_answer(self._edge, request, receive)
        except KeyboardInterrupt:
            if texts:
                self._keep(messages, "".join(texts))
            raise
        self._keep(messages, answer.text)
        return answer

    def _keep(self, messages: list[inference_pb2.Message], text: str) -> None:
        self._messages = [*messages, text_message(inference_pb2.ROLE_ASSISTANT, text)]


def check_chat_model(edge: EdgeClient, model: str) -> None:
    """Checks that this model exists and can chat. The token needs the scope `read`.

    Raises:
        CliError: no chat model of this name is deployed, or the mesh cannot be reached.
    """
    stub = router_pb2_grpc.RouterServiceStub(edge.channel)
    try:
        found = stub.Route(
            router_pb2.RouteRequest(model=model), metadata=edge.metadata, timeout=CHECK_SECONDS
        )
    except grpc.RpcError as error:
        if error.code() in _WRONG_MODEL or unreachable_address(error):
            raise CliError(describe(error)) from error
    else:
        if found.schema.kind != model_pb2.MODEL_KIND_CHAT:
            raise CliError(
                f"{model} cannot chat; models that can: {', '.join(chat_models(edge)) or 'none'}"
            )


def chat_models(edge: EdgeClient) -> list[str]:
    """Returns the names of the deployed models that can chat. The token needs the scope `read`.

    Raises:
        CliError: the call failed.
    """
    deployed = Registry(edge).deployments()
    names = sorted({deployment.model_version.partition("@")[0] for deployment in deployed})
    stub = router_pb2_grpc.RouterServiceStub(edge.channel)
    return [name for name in names if _kind(stub, edge, name) == model_pb2.MODEL_KIND_CHAT]


def _kind(stub: router_pb2_grpc.RouterServiceStub, edge: EdgeClient, model: str) -> int:
    request = router_pb2.RouteRequest(model=model)
    try:
        answer = stub.Route(request, metadata=edge.metadata, timeout=CHECK_SECONDS)
    except grpc.RpcError:
        return model_pb2.MODEL_KIND_UNSPECIFIED  # not ready
    return int(answer.schema.kind)

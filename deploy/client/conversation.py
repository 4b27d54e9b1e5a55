"""A conversation with a model: each question is sent with the messages before it."""

from __future__ import annotations

from collections.abc import Callable

from headrace.inference.v1 import inference_pb2

from deploy.client.answers import Answer, stream_answer
from deploy.client.edge import EdgeClient
from libs.chat.wire import text_message

# Older messages are left out, so that the prompt does not outgrow a small model's context.
HISTORY_MESSAGES = 12


class Conversation:
    """Keeps the messages of a conversation. A question that fails is not kept."""

    def __init__(
        self, edge: EdgeClient, *, model: str, max_tokens: int, temperature: float
    ) -> None:
        self._edge = edge
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._messages: list[inference_pb2.Message] = []

    def ask(self, question: str, on_text: Callable[[str], None]) -> Answer:
        """Streams the answer to a question.

        Raises:
            grpc.RpcError: see `stream_answer`.
        """
        messages = [*self._messages, text_message(inference_pb2.ROLE_USER, question)]
        request = inference_pb2.GenerateRequest(
            model=self._model,
            messages=messages[-HISTORY_MESSAGES:],
            max_tokens=self._max_tokens,
            temperature=self._temperature,
        )
        answer = stream_answer(self._edge, request, on_text)
        self._messages = [
            *messages,
            text_message(inference_pb2.ROLE_ASSISTANT, answer.text),
        ]
        return answer

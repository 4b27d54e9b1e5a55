"""How much work a request is, estimated before it is tokenized, and how large its texts may be."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, MODEL_KIND_EMBEDDING, ModelSchema

from libs.chat.request import GenerationRequest
from libs.embedding_texts import MAX_BYTES_PER_TOKEN as MAX_BYTES_PER_TEXT_TOKEN
from libs.errors import InvalidArgument

# Of English text. Estimates decide about the order of requests. They decide about bills only where
# a caller left and its tenant has too many prompts that are to be counted (`Recorder`).
BYTES_PER_TOKEN = 4
# No tokenizer in use has tokens of so many bytes on average, however long single ones are. A prompt
# that is longer cannot fit, and need not be tokenized to find that out.
MAX_BYTES_PER_TOKEN = 256
# Of a request to a chat model besides its conversation: settings, stop sequences, roles.
MAX_SETTINGS_BYTES = 64 * 1024


def prompt_bytes(request: GenerationRequest) -> int:
    """Returns the size of a conversation in UTF-8."""
    return sum(size_bytes(message.content) for message in request.messages)


def size_bytes(text: str) -> int:
    """Returns the size of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def check_prompt(request: GenerationRequest, schema: ModelSchema) -> int:
    """Returns the size of a conversation in bytes.

    Raises:
        InvalidArgument: it cannot fit into the context of the model (`MESSAGE_TOO_LARGE`).
    """
    size = prompt_bytes(request)
    limit = schema.context_tokens * MAX_BYTES_PER_TOKEN
    if limit and size > limit:
        raise InvalidArgument.too_large(
            "messages",
            f"have {size} bytes, more than can fit into {schema.context_tokens} tokens: {limit}",
            limit_bytes=limit,
        )
    return size


def max_text_bytes(schema: ModelSchema) -> int:
    """Returns how long an element of a text tensor may be; 0: the model is not known to take any.

    A chat model's is JSON, in which escapes may double the size of a conversation.
    """
    if schema.kind == MODEL_KIND_EMBEDDING:
        return schema.max_input_tokens * MAX_BYTES_PER_TEXT_TOKEN
    if schema.kind == MODEL_KIND_CHAT and schema.context_tokens:
        return 2 * schema.context_tokens * MAX_BYTES_PER_TOKEN + MAX_SETTINGS_BYTES
    return 0


def chat_work(prompt_size_bytes: int, max_tokens: int) -> int:
    """Returns the tokens of a prompt and its answer."""
    return prompt_size_bytes // BYTES_PER_TOKEN + max_tokens


def text_work(text: str, max_input_tokens: int) -> int:
    """Returns the tokens of a text to embed; longer ones than the model takes are cut."""
    tokens = size_bytes(text) // BYTES_PER_TOKEN + 2  # its start and its end have one each
    return min(tokens, max_input_tokens) if max_input_tokens else tokens


def tensor_work(message: bytes, schema: ModelSchema) -> int:
    """Returns the tokens of a tensor request, as if all of it were text, and of its answer."""
    return len(message) // BYTES_PER_TOKEN + 1 + schema.max_output_tokens


def next_part(texts: Sequence[str], *, max_input_tokens: int, part_work: int) -> tuple[int, int]:
    """Returns how many of the first texts to embed together, at least one, and their work."""
    work = count = 0
    for text in texts:
        more = text_work(text, max_input_tokens)
        if count and work + more > part_work:
            break
        work += more
        count += 1
    return count, work

"""A chat call, what was delivered of its answer, and how it can end: plain data and its rules."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum

from libs.chat.request import GenerationRequest
from libs.errors import HeadraceError, Internal, InvalidArgument, ResourceExhausted, Unavailable
from libs.model_reference import version_of

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """A generation request while this service runs it.

    Attributes:
        request_id: the one of the request, or a generated one.
        streamed: False: the caller receives the answer as a whole, so backends need not stream it.
        deadline_seconds: the caller's deadline, on the clock's monotonic time; None: none.
        cache_salt: of the tenant; engines share prompts only between calls with the same one.
    """

    request_id: str
    request: GenerationRequest
    streamed: bool = True
    deadline_seconds: float | None = None
    cache_salt: str = ""

    def check(self) -> None:
        """Checks that every field of the request is valid.

        Raises:
            InvalidArgument: names every field that is not.
        """
        if wrong := self.request.violations():
            raise InvalidArgument.of_fields(wrong)

    def max_tokens_for(self, max_output_tokens: int) -> int:
        """Returns how long the answer may be, on a model with this limit.

        Raises:
            InvalidArgument: the request asks for more than the model's limit, or to continue after
                more tokens than its answer can have.
        """
        wanted = self.request.max_tokens
        if wanted is None:
            wanted = min(DEFAULT_MAX_TOKENS, max_output_tokens)
        if wanted > max_output_tokens:
            raise InvalidArgument.of_field(
                "max_tokens", f"must be at most {max_output_tokens} for this model"
            )
        if self.request.resumed_tokens > wanted:
            raise InvalidArgument.of_field(
                "resume_from",
                f"is after the end of the longest answer of this request: {wanted} tokens",
            )
        return wanted


@dataclass
class TokenUsage:
    """The tokens that a request used. `cached_tokens` are part of `prompt_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True)
class ClientError:
    """The error for the caller, if no other backend can take over after a failure."""

    kind: type[HeadraceError]
    message: str
    reason: str
    retry_after_seconds: float | None = None

    def retry_after(self, seconds: float) -> ClientError:
        """Returns this error with a wait of at least so long."""
        return replace(self, retry_after_seconds=max(seconds, self.retry_after_seconds or 0.0))

    def to_error(
        self, backends: Collection[str], *, request_id: str = "", trace_id: str = ""
    ) -> HeadraceError:
        """Returns the exception.

        Args:
            backends: those that failed; named in the metadata.
            request_id: by which operators find the request in the log; empty: it has none.
            trace_id: named where there is no request id.
        """
        key, value = ("request", request_id) if request_id else ("trace", trace_id)
        named = {f"{key}_id": value} if value else {}
        return self.kind(
            f"{self.message} ({key} {value})" if value else self.message,
            reason=self.reason,
            metadata={"backend": ",".join(sorted(backends)), **named},
            retry_after_seconds=self.retry_after_seconds,
        )


BACKENDS_FAILED = ClientError(Unavailable, "the backends failed", "BACKEND_FAILED", 1.0)
QUEUES_FULL = ClientError(
    ResourceExhausted, "the backends' queues are full; try again later", "QUEUE_FULL", 1.0
)
# Nothing of the model's own text: it may have paths, or quote other requests.
MODEL_FAILED = ClientError(
    Internal, "the model failed on this request; see the mesh's log", "MODEL_FAILED"
)

# A request that makes the model fail goes to so many backends at most.
MAX_MODEL_FAILURES = 2


class Fault(Enum):
    """Whose fault a failure of a backend is; the backend's breaker counts accordingly."""

    BACKEND = "backend"
    REQUEST_OR_BACKEND = "request or backend"
    NOBODY = "nobody"


class BackendFailedError(Exception):
    """A backend did not do its work: another backend may continue where this one stopped.

    Its text is for the log: it must not quote the request.

    Attributes:
        backends: the ids of the backends that failed; set by the code that leased them.
        client_error: for the caller, if no other backend takes over.
        attempts: how often one backend is tried for a request; None: as often as time permits.
        retry_after_seconds: how long the backend asks not to be called.
        resumable: False: no other backend can continue what this one delivered.
        fault: whose it is.
    """

    def __init__(
        self,
        message: str,
        *,
        client_error: ClientError = BACKENDS_FAILED,
        attempts: int | None = None,
        retry_after_seconds: float = 0.0,
        resumable: bool = True,
        fault: Fault = Fault.BACKEND,
    ) -> None:
        super().__init__(message)
        self.backends: frozenset[str] = frozenset()
        self.client_error = client_error
        self.attempts = attempts
        self.retry_after_seconds = retry_after_seconds
        self.resumable = resumable
        self.fault = fault


class DeploymentFailedError(Exception):
    """All backends of a deployment failed before a token: another deployment may answer.

    Attributes:
        error: for the caller, if none does.
    """

    def __init__(self, error: HeadraceError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(frozen=True)
class Finish:
    """How an engine ended an answer. After a resume, `prompt_tokens` excludes resumed tokens."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Chunk:
    """A part of an answer, as one message of an engine, or as several that were merged.

    Attributes:
        text: complete characters.
        token_ids: the ids of its tokens, as far as the engine reported them.
        token_count: its tokens, also those without an id or text.
        finish: set in the last chunk.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    token_count: int = 0
    finish: Finish | None = None

    def followed_by(self, chunk: Chunk) -> Chunk:
        """Returns this chunk and the next one as one."""
        return Chunk(
            self.text + chunk.text,
            self.token_ids + chunk.token_ids,
            self.token_count + chunk.token_count,
            chunk.finish,
        )


@dataclass
class Delivered:
    """What an answer has so far, in the form in which an engine can continue it.

    Attributes:
        segments: token ids, or text where ids are missing.
        token_count: of all of it.
    """

    segments: list[int | str] = field(default_factory=list)
    token_count: int = 0

    def add(self, chunk: Chunk) -> bool:
        """Appends a chunk; False: it is not appended, because no engine could continue after it.

        An engine continues after token ids, or after text if ids are missing. A chunk with neither
        text nor all of its ids must be added, and delivered, together with the next one: if it were
        counted, an engine that continues the answer would generate and count its tokens again.
        """
        if len(chunk.token_ids) == chunk.token_count:
            self.segments.extend(chunk.token_ids)
        elif chunk.text:
            self.segments.append(chunk.text)
        elif chunk.finish is None:
            return False
        self.token_count += chunk.token_count
        return True


@dataclass(frozen=True, kw_only=True)
class Route:
    """Which deployment answers, and why.

    Attributes:
        deployment: `deployments/{deployment}`.
        reason: for people.
        epoch: of the router whose snapshot decided.
        revision: of that snapshot.
        model_version: `models/{model}/versions/{semver}`.
        artifact_digest: `sha256:` and 64 hex digits.
    """

    deployment: str
    reason: str
    epoch: str
    revision: int
    model_version: str
    artifact_digest: str

    @property
    def version(self) -> str:
        """The semantic version."""
        return version_of(self.model_version)


@dataclass(frozen=True, kw_only=True)
class Started:
    """What is known when an answer starts.

    Attributes:
        trace_id: W3C trace id, 32 hex digits.
        is_resumable: whether the client can continue the answer after a break.
    """

    request_id: str
    trace_id: str
    route: Route
    is_resumable: bool


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """A complete answer, apart from its text.

    Attributes:
        usage: what the client pays for.
        cost_nano_usd: as recorded.
        trace_id: W3C trace id, 32 hex digits.
        first_token_seconds: from the arrival of the request to the first chunk.
        resumed_count: how often another backend took over in the middle of the answer.
        recomputed_tokens: of prompt and answer, processed again because of that; not billed.
    """

    request_id: str
    trace_id: str
    route: Route
    finish_reason: str
    usage: TokenUsage
    cost_nano_usd: int
    first_token_seconds: float
    resumed_count: int
    recomputed_tokens: int

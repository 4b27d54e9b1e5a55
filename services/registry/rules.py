"""What may be registered, deployed and reported. Plain Python, like `domain`."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime

from libs.errors import Aborted, FailedPrecondition, InvalidArgument
from libs.redaction import public_text
from libs.rpc.names import parse_name
from services.registry.domain import (
    DEFAULT_POOL,
    Deployment,
    Lineage,
    Model,
    State,
    TritonBackend,
)

MAX_DESCRIPTION_LENGTH = 4096
MAX_LINEAGE_LENGTH = 1024
MAX_ADDRESS_LENGTH = 512

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_POOL = re.compile(r"[a-z][a-z0-9-]{0,62}")
_BACKEND_ID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def new_model(*, name: str, description: str, now: datetime) -> Model:
    """Makes a model.

    Raises:
        InvalidArgument: a field is invalid.
    """
    _check_text("model.description", description, MAX_DESCRIPTION_LENGTH)
    return Model(parse_name(name, "models", field="model.name"), description, now)


def check_lineage(lineage: Lineage) -> Lineage:
    """Returns the lineage.

    Raises:
        InvalidArgument: a field is too long.
    """
    for field in ("training_run", "dataset", "source_revision"):
        _check_text(f"model_version.lineage.{field}", getattr(lineage, field), MAX_LINEAGE_LENGTH)
    return lineage


def check_pool(pool: str) -> str:
    """Returns the name of the pool: the default one if it is empty.

    Raises:
        InvalidArgument: the name is invalid.
    """
    if pool and not _POOL.fullmatch(pool):
        raise InvalidArgument.of_field(
            "deployment.spec.pool", "must be of a-z, 0-9 and -, start with a letter, at most 63"
        )
    return pool or DEFAULT_POOL


def check_backend(backend: TritonBackend) -> TritonBackend:
    """Returns the report as it is stored: the message redacted, and cut rather than refused.

    Raises:
        InvalidArgument: a field is invalid, or a ready backend lacks what is needed to call it.
    """
    needed = {
        "backend.triton.address": backend.target.address,
        "backend.triton.model": backend.target.model,
        "backend.status.artifact_digest": backend.artifact_digest,
    }
    wrong = []
    if not _BACKEND_ID.fullmatch(backend.id):
        wrong.append(("backend.status.id", "must be of letters, digits, ., _ and -, at most 63"))
    if backend.state is State.READY:
        wrong += [
            (field, "must be set where the state is READY")
            for field, value in needed.items()
            if not value
        ]
    if wrong:
        raise InvalidArgument.of_fields(wrong)
    for field, value in needed.items():
        _check_text(field, value, MAX_ADDRESS_LENGTH)
    return replace(backend, message=public_text(backend.message))


def check_report(backend: TritonBackend, deployment: Deployment) -> None:
    """Checks that a deployment accepts this report of a backend.

    Raises:
        InvalidArgument: a provider runs the deployment.
        FailedPrecondition: the backend is ready with another artifact than the version's; under a
            version's name nothing else is served.
    """
    version = deployment.model_version
    if version.provider is not None:
        raise InvalidArgument.of_field("deployment", "is run by a provider, not by a pool")
    if backend.state is State.READY and backend.artifact_digest != version.artifact_digest:
        raise FailedPrecondition(
            f"{backend.id} has another artifact than {version.name}",
            reason="DIGEST_MISMATCH",
            metadata={
                "expected_digest": version.artifact_digest,
                "actual_digest": backend.artifact_digest,
            },
        )


def check_etag(deployment: Deployment, etag: str) -> None:
    """Checks the etag of an update or a delete; an empty one matches.

    Raises:
        Aborted: the spec has changed since the caller read it.
    """
    if etag and etag != deployment.etag:
        raise Aborted(
            f"{deployment.name} has changed; read it again and retry",
            reason="ETAG_MISMATCH",
            metadata={"resource": deployment.name},
            resource=deployment.name,
        )


def check_same_model(deployment: Deployment, model: str) -> None:
    """Checks that a new version of a deployment belongs to the model of its old version.

    Raises:
        InvalidArgument: it belongs to another model.
    """
    if model != deployment.model_version.model:
        raise InvalidArgument.of_field(
            "deployment.spec.model_version",
            f"must be a version of models/{deployment.model_version.model}; "
            "create another deployment for another model",
        )


def missing_version(name: str) -> FailedPrecondition:
    """Makes the error of a deployment whose version does not exist."""
    return FailedPrecondition(
        f"{name} does not exist",
        reason="RESOURCE_NOT_FOUND",
        metadata={"resource": name},
        resource=name,
    )


def check_digest(digest: str, *, field: str) -> str:
    """Returns the digest.

    Raises:
        InvalidArgument: it is not `sha256:` and 64 lower-case hex digits.
    """
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument.of_field(field, "must be sha256: and 64 lower-case hex digits")
    return digest


def _check_text(field: str, value: str, limit: int) -> None:
    if "\0" in value:  # PostgreSQL accepts none
        raise InvalidArgument.of_field(field, "has a NUL character")
    if len(value) > limit:
        raise InvalidArgument.of_field(field, f"has {len(value)} characters, more than {limit}")

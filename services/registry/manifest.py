"""What an artifact says of itself: `headrace.json`, at the top of its tar."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO

from libs.errors import FailedPrecondition, InvalidArgument
from services.registry.artifacts import ArtifactStore
from services.registry.domain import Kind, Schema

MANIFEST_NAME = "headrace.json"
MAX_MANIFEST_BYTES = 256 * 1024
# An artifact is a folder of weights and a few files beside them; more is a mistake.
MAX_MEMBERS = 10_000
_FIELD = "model_version.artifact_digest"
_MAX_INT32 = 2**31 - 1

_LIMITS = {
    Kind.CHAT: ("context_tokens", "max_output_tokens"),
    Kind.EMBEDDING: ("dimensions", "max_input_tokens"),
}


def schema_of_artifact(artifacts: ArtifactStore, digest: str) -> Schema:
    """Reads the schema of a version out of its artifact. Blocks.

    Raises:
        FailedPrecondition: there is no such artifact.
        InvalidArgument: the artifact has no sound `headrace.json`.
    """
    artifact = artifacts.open(digest)
    if artifact is None:
        raise FailedPrecondition(
            f"no artifact {digest}; upload it first",
            reason="ARTIFACT_NOT_FOUND",
            metadata={"digest": digest},
        )
    with artifact:
        return read_schema(artifact)


def read_schema(artifact: BinaryIO) -> Schema:
    """Reads the schema of a version out of its artifact, an uncompressed tar that can be sought.

    Raises:
        InvalidArgument: the artifact is no such tar, or has no sound `headrace.json`.
    """
    try:
        with tarfile.open(fileobj=artifact, mode="r:") as tar:
            return parse_schema(_manifest_bytes(tar))
    except tarfile.TarError as error:
        raise _refused("is not an uncompressed tar") from error


def parse_schema(manifest: bytes) -> Schema:
    """Reads the schema out of the bytes of `headrace.json`; keys that it does not need may follow.

    Raises:
        InvalidArgument: it is not sound.
    """
    try:
        values = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{MANIFEST_NAME} is not JSON") from error
    if not isinstance(values, dict):
        raise _refused(f"{MANIFEST_NAME} is not an object")
    try:
        kind = Kind(values.get("kind"))
    except ValueError:
        kinds = ", ".join(f'"{kind.value}"' for kind in Kind)
        raise _refused(f'{MANIFEST_NAME}: "kind" must be one of {kinds}') from None
    return Schema(kind, **{field: _positive(values, field) for field in _LIMITS[kind]})


def _manifest_bytes(tar: tarfile.TarFile) -> bytes:
    for count, member in enumerate(tar):
        if count >= MAX_MEMBERS:
            raise _refused(f"has more than {MAX_MEMBERS} files")
        if member.name.removeprefix("./") != MANIFEST_NAME or not member.isfile():
            continue
        if member.size > MAX_MANIFEST_BYTES:
            raise _refused(f"{MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes")
        content = tar.extractfile(member)
        if content is not None:
            return content.read()
    raise _refused(f"has no {MANIFEST_NAME}")


def _positive(values: Mapping[str, Any], field: str) -> int:
    value = values.get(field)
    if type(value) is not int or not 0 < value <= _MAX_INT32:
        raise _refused(f'{MANIFEST_NAME}: "{field}" must be a positive number')
    return value


def _refused(description: str) -> InvalidArgument:
    return InvalidArgument.of_field(_FIELD, f"the artifact {description}")

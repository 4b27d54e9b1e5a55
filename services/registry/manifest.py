"""Reads the manifest of an artifact: `headrace.json`, at the top of its tar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, BinaryIO

from libs.artifact_tar import TarRefusedError, read_file, tar_files
from libs.errors import FailedPrecondition, InvalidArgument
from libs.http_client import Url
from libs.model_config import CONFIG_NAME, ModelConfigRefusedError, check_file, read_config
from services.registry.artifacts import ArtifactStore
from services.registry.domain import Kind, Manifest, ProviderTarget, Schema

MANIFEST_NAME = "headrace.json"
MAX_MANIFEST_BYTES = 256 * 1024
_PROVIDER_MODEL = re.compile(r"[^\x00-\x1f\ud800-\udfff]{1,256}")
_API_KEY_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})?")
_FIELD = "model_version.artifact_digest"
_MAX_INT32 = 2**31 - 1

_LIMITS = {
    Kind.CHAT: ("context_tokens", "max_output_tokens"),
    Kind.EMBEDDING: ("dimensions", "max_input_tokens"),
}
_CONCURRENCY = "max_concurrent_requests"


def manifest_of_artifact(artifacts: ArtifactStore, digest: str) -> Manifest:
    """Reads the manifest of a stored artifact. Blocks.

    Raises:
        FailedPrecondition: the artifact does not exist.
        InvalidArgument: the artifact has no valid `headrace.json`.
    """
    artifact = artifacts.open(digest)
    if artifact is None:
        raise FailedPrecondition(
            f"the artifact {digest} does not exist; upload it first",
            reason="ARTIFACT_NOT_FOUND",
            metadata={"digest": digest},
        )
    with artifact:
        return read_manifest(artifact)


def read_manifest(artifact: BinaryIO) -> Manifest:
    """Reads the manifest of an artifact: an uncompressed tar, in a seekable file.

    All of the tar and the model's `config.pbtxt` are checked, so that what no agent would unpack is
    refused here. Whether it has a configuration is for the agent to check: providers need none.

    Raises:
        InvalidArgument: it is not such a tar, has something that it must not have, or has no valid
            `headrace.json`.
    """
    manifest = None
    try:
        for file in tar_files(artifact):
            check_file(file.path)
            if str(file.path) == CONFIG_NAME:
                read_config(file.size_bytes, partial(read_file, artifact, file))
            if str(file.path) == MANIFEST_NAME:
                if file.size_bytes > MAX_MANIFEST_BYTES:
                    raise _refused(f"{MANIFEST_NAME} has more than {MAX_MANIFEST_BYTES} bytes")
                manifest = read_file(artifact, file)
    except (TarRefusedError, ModelConfigRefusedError) as error:
        raise _refused(str(error)) from error
    if manifest is None:
        raise _refused(f"has no {MANIFEST_NAME}")
    return parse_manifest(manifest)


def parse_manifest(manifest: bytes) -> Manifest:
    """Reads the bytes of `headrace.json`; unknown keys are skipped.

    Raises:
        InvalidArgument: it is invalid.
    """
    try:
        values = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise _refused(f"{MANIFEST_NAME} is invalid JSON") from error
    if not isinstance(values, dict):
        raise _refused(f"{MANIFEST_NAME} is not an object")
    try:
        kind = Kind(values.get("kind"))
    except ValueError:
        kinds = ", ".join(f'"{kind.value}"' for kind in Kind)
        raise _refused(f'{MANIFEST_NAME}: "kind" must be one of {kinds}') from None
    limits = {field: _positive(values, field) for field in _LIMITS[kind]}
    if _CONCURRENCY in values:
        limits[_CONCURRENCY] = _positive(values, _CONCURRENCY)
    schema = Schema(kind, **limits)
    return Manifest(schema, _provider(values, kind))


def _positive(values: Mapping[str, Any], field: str) -> int:
    value = values.get(field)
    if type(value) is not int or not 0 < value <= _MAX_INT32:
        raise _refused(f'{MANIFEST_NAME}: "{field}" must be a positive number')
    return value


def _provider(values: Mapping[str, Any], kind: Kind) -> ProviderTarget | None:
    found = values.get("provider")
    if found is None:
        return None
    if kind is not Kind.CHAT or not isinstance(found, dict):
        raise _refused(
            f'{MANIFEST_NAME}: "provider" must be an object, and only a chat model can have it'
        )
    base_url, model, api_key_name = (
        found.get(field, "") for field in ("base_url", "model", "api_key_name")
    )
    if not isinstance(base_url, str) or not _is_base_url(base_url):
        raise _refused(
            f'{MANIFEST_NAME}: "base_url" must be http(s)://HOST/PATH, without user or query'
        )
    if not isinstance(model, str) or not _PROVIDER_MODEL.fullmatch(model):
        raise _refused(f'{MANIFEST_NAME}: "model" must be the name of the model at the provider')
    if not isinstance(api_key_name, str) or not _API_KEY_NAME.fullmatch(api_key_name):
        raise _refused(f'{MANIFEST_NAME}: "api_key_name" must be the name of a file, not a key')
    return ProviderTarget(base_url, model, api_key_name)


def _is_base_url(text: str) -> bool:
    """Returns whether a text is a URL in ASCII about which no parsers disagree."""
    try:
        Url.parse(text)
    except ValueError:
        return False
    return text.isascii()


def _refused(description: str) -> InvalidArgument:
    return InvalidArgument.of_field(_FIELD, f"the artifact {description}")

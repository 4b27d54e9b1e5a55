"""The manifest in an artifact."""

from __future__ import annotations

import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import InvalidArgument
from services.registry.domain import Kind, Manifest, ProviderTarget, Schema
from services.registry.manifest import MAX_MANIFEST_BYTES, parse_manifest, read_manifest
from tests.support.registry import CHAT, EMBEDDING, artifact


def test_the_schema_is_read_from_the_artifact():
    """What a version accepts and returns is fixed with its bytes."""
    assert read_manifest(io.BytesIO(artifact(CHAT))) == Manifest(
        Schema(Kind.CHAT, context_tokens=1024, max_output_tokens=256)
    )
    assert read_manifest(io.BytesIO(artifact(EMBEDDING))) == Manifest(
        Schema(Kind.EMBEDDING, dimensions=384, max_input_tokens=256)
    )


def test_the_manifest_may_have_more_keys_and_a_path_with_a_dot():
    """`tar -c .` writes `./headrace.json`; other keys are not for the registry."""
    more = CHAT | {"preprocessing": {"tokenizer": "1/t.json"}, "dimensions": "none"}
    packed = artifact(more, manifest_name="./headrace.json")
    assert read_manifest(io.BytesIO(packed)).schema.context_tokens == CHAT["context_tokens"]
    assert parse_manifest(json.dumps(more).encode()).schema.dimensions == 0


PROVIDER = {"base_url": "https://api.example.com/v1", "model": "gpt-9", "api_key_name": "example"}


def test_a_manifest_may_name_a_provider():
    """Then no pool loads the version; the key itself is never in an artifact."""
    packed = artifact(CHAT | {"provider": PROVIDER})
    assert read_manifest(io.BytesIO(packed)).provider == ProviderTarget(
        "https://api.example.com/v1", "gpt-9", "example"
    )
    local = {"base_url": "http://127.0.0.1:9000", "model": "m"}
    assert parse_manifest(
        json.dumps(CHAT | {"provider": local}).encode()
    ).provider == ProviderTarget("http://127.0.0.1:9000", "m", "")


@pytest.mark.parametrize(
    "manifest",
    [
        EMBEDDING | {"provider": PROVIDER},
        CHAT | {"provider": "example"},
        CHAT | {"provider": {}},
        CHAT | {"provider": PROVIDER | {"model": ""}},
        CHAT | {"provider": PROVIDER | {"model": 7}},
        CHAT | {"provider": PROVIDER | {"api_key_name": "../keys/edge.pem"}},
        CHAT | {"provider": PROVIDER | {"api_key_name": None}},
        *(
            CHAT | {"provider": PROVIDER | {"base_url": url}}
            for url in [
                "", "api.example.com", "file:///etc/passwd", "https://", "https://u:p@host/v1",
                "https://host/v1?key=1", "https://host:99999/", "https://ho st/", "https://[::1/",
            ]
        ),
    ],
)  # fmt: skip
def test_a_provider_that_cannot_be_called_is_refused(manifest):
    """Before it is deployed, not when the first request fails."""
    with pytest.raises(InvalidArgument):
        parse_manifest(json.dumps(manifest).encode())


def test_only_the_manifest_at_the_top_counts():
    """A file of the same name deeper in the folder is not the manifest."""
    with pytest.raises(InvalidArgument):
        read_manifest(io.BytesIO(artifact(CHAT, manifest_name="1/headrace.json")))


@pytest.mark.parametrize(
    ("packed", "text"),
    [
        (b"", "uncompressed tar"),
        (b"no tar at all", "uncompressed tar"),
        (gzip.compress(artifact(CHAT)), "uncompressed tar"),
        (artifact(CHAT)[:700], "tar"),
        (artifact(None), "has no headrace.json"),
        (artifact(b"{"), "is invalid JSON"),
        (artifact(b"[" * 100_000), "is invalid JSON"),
        (artifact(b"[]"), "is not an object"),
        (artifact({}), '"kind"'),
        (artifact(CHAT | {"kind": "vision"}), '"kind"'),
        (artifact(CHAT | {"kind": []}), '"kind"'),
        (artifact({"kind": "chat", "context_tokens": 10}), '"max_output_tokens"'),
        (artifact(CHAT | {"context_tokens": 0}), '"context_tokens"'),
        (artifact(CHAT | {"context_tokens": True}), '"context_tokens"'),
        (artifact(CHAT | {"context_tokens": 1.5}), '"context_tokens"'),
        (artifact(CHAT | {"context_tokens": 2**31}), '"context_tokens"'),
        (artifact(EMBEDDING | {"dimensions": -1}), '"dimensions"'),
        (artifact(b" " * (MAX_MANIFEST_BYTES + 1)), "more than"),
    ],
)
def test_an_artifact_without_a_valid_manifest_is_refused(packed, text):
    """The error names the field and what is missing."""
    with pytest.raises(InvalidArgument) as raised:
        read_manifest(io.BytesIO(packed))
    ((field, description),) = raised.value.field_violations
    assert field == "model_version.artifact_digest"
    assert text in description


@given(st.data())
def test_a_damaged_artifact_is_refused_and_never_an_internal_error(data):
    """Whatever bytes are changed or cut, the result is a schema or an INVALID_ARGUMENT."""
    packed = bytearray(artifact(CHAT))
    for _ in range(data.draw(st.integers(1, 8))):
        packed[data.draw(st.integers(0, 2048))] = data.draw(st.integers(0, 255))
    size = data.draw(st.integers(0, len(packed)))
    try:
        manifest = read_manifest(io.BytesIO(bytes(packed[:size])))
    except InvalidArgument:
        return
    assert manifest.schema.kind in Kind

"""How the edge verifies tokens, and which verified ones it refuses.

The verifying filter is in a file of its own, since Envoy reads that again when it is replaced. Of
`local_jwks` it does not read a changed file again, so the file holds the keys themselves.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from libs.chat.request import MAX_PRIORITY
from libs.claims import NAME, SCOPES
from libs.rpc.http_api import HEALTH_PATH

FILTER = "envoy.filters.http.jwt_authn"

_TYPES = "type.googleapis.com/"
_FILTER_TYPE = f"{_TYPES}envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication"
_INTERNAL = "(.* )?internal( .*)?"
# Exact paths, so that no other spelling of a path matches.
_OPEN_PATHS = (
    HEALTH_PATH,
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
_CLAIM_HEADERS = {
    "x-headrace-tenant": "tenant",
    "x-headrace-user": "sub",
    "x-headrace-scopes": "scopes",
    "x-headrace-max-priority": "max_priority",
}

_Rule = dict[str, Any]


def filter_in(file: Path) -> dict[str, Any]:
    """Returns the filter's entry in the configuration, which names the file of `filter_file`."""
    return {
        "name": FILTER,
        "config_discovery": {
            "config_source": {
                "path_config_source": {"path": str(file)},
                "resource_api_version": "V3",
            },
            "type_urls": [_FILTER_TYPE],
        },
    }


def filter_file(*, issuer: str, audience: str, jwks: str) -> dict[str, Any]:
    """Returns what the file of the filter holds.

    Args:
        issuer: the issuer of valid tokens.
        audience: the audience of valid tokens.
        jwks: the JSON Web Key Set that they are verified with.
    """
    provider = {
        "issuer": issuer,
        "audiences": [audience],
        "require_expiration": True,
        # Nothing else: by default a token in `?access_token=` would be accepted, too.
        "from_headers": [{"name": "Authorization", "value_prefix": "Bearer "}],
        "local_jwks": {"inline_string": jwks},
        "jwt_cache_config": {"jwt_cache_size": 1000},  # a verified token is not verified again
        # Replaces a header that the client sent. Without the claim, the header is removed.
        "claim_to_headers": [
            {"header_name": header, "claim_name": claim} for header, claim in _CLAIM_HEADERS.items()
        ],
        "payload_in_metadata": "claims",  # for `claim_rules`
    }
    rules: list[dict[str, Any]] = [{"match": {"path": path}} for path in _OPEN_PATHS]
    rules.append({"match": {"prefix": "/"}, "requires": {"provider_name": "headrace"}})
    resource = {
        "@type": f"{_TYPES}envoy.config.core.v3.TypedExtensionConfig",
        "name": FILTER,
        "typed_config": {
            "@type": _FILTER_TYPE,
            "providers": {"headrace": provider},
            "rules": rules,
        },
    }
    version = hashlib.sha256(jwks.encode()).hexdigest()
    return {"version_info": version, "resources": [resource]}


def claim_rules() -> _Rule:
    """Returns the rules that refuse claims of another form than `libs.claims` allows.

    Envoy copies claims into headers whatever their type: a number becomes its text, a list becomes
    Base64 of its JSON. Both look like names then, so the type is checked here, where it is known.
    The rules concern requests with a verified token only.
    """
    invalid = [
        _not(_text("tenant", NAME)),
        _not(_text("sub", NAME)),
        _and(_present("scopes"), _not(_text("scopes", SCOPES))),
        _text("scopes", _INTERNAL),
        _and(_present("max_priority"), _not(_priority())),
        # Envoy joins repeated headers by a comma, and takes the first token of the result.
        {"header": {"name": "authorization", "string_match": {"contains": ","}}},
    ]
    policy = {
        "permissions": [{"any": True}],
        "principals": [_and(_present("iss"), {"or_ids": {"ids": invalid}})],
    }
    return {"action": "DENY", "policies": {"invalid-claims": policy}}


def _claim(name: str, value: _Rule) -> _Rule:
    path = [{"key": "claims"}, {"key": name}]
    matcher = {"filter": FILTER, "path": path, "value": value}
    return {"sourced_metadata": {"metadata_matcher": matcher}}


def _present(name: str) -> _Rule:
    return _claim(name, {"present_match": True})


def _text(name: str, pattern: str) -> _Rule:
    """Matches a claim that is one string of this form; a regular expression matches all of it."""
    return _claim(name, {"string_match": {"safe_regex": {"regex": pattern}}})


def _priority() -> _Rule:
    # The end of a range is not in it. The services refuse fractions.
    in_range = {"range": {"start": 0, "end": MAX_PRIORITY + 1}}
    return _claim("max_priority", {"double_match": in_range})


def _not(rule: _Rule) -> _Rule:
    return {"not_id": rule}


def _and(*rules: _Rule) -> _Rule:
    return {"and_ids": {"ids": list(rules)}}

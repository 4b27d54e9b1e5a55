"""The keys of one mesh, and the tokens that they sign.

`HEADRACE_HOME/keys` (mode 0700) holds

* `edge.pem`: the ES256 key that signs tokens;
* `edge.next.pem`: only while it is being replaced, the key that follows;
* `retired.json`: the public halves of replaced keys, until the last token of each has expired;
* `last-expiry`: when the last token of `edge.pem` expires, at the latest;
* `jwks.json`: the public halves that the edge verifies tokens with, made of the files above;
* `input-hash.key`: the key of the hashes that replace inputs in logs; it is never replaced;
* `triton-control.key`: required to change what Triton serves;
* `nats-USER.credentials`: the passwords of the services on the bus.

Others use what is named here, and `files` to write files that only their owner can read; the other
modules are internal.
"""

from __future__ import annotations

from deploy.keys.files import KeyFileError, input_hash_key_path, jwks_path, keys_dir
from deploy.keys.inner import (
    ensure_nats_credentials,
    ensure_triton_control_key,
    nats_credentials_path,
    triton_control_key_path,
)
from deploy.keys.rotation import SigningKey, rotate, signing_keys
from deploy.keys.signing import ensure_keys
from deploy.keys.tokens import (
    AUDIENCE,
    DEFAULT_SCOPES,
    DEFAULT_TTL_SECONDS,
    ISSUER,
    MAX_TTL_SECONDS,
    SCOPES,
    mint_token,
)

__all__ = [
    "AUDIENCE",
    "DEFAULT_SCOPES",
    "DEFAULT_TTL_SECONDS",
    "ISSUER",
    "MAX_TTL_SECONDS",
    "SCOPES",
    "KeyFileError",
    "SigningKey",
    "ensure_keys",
    "ensure_nats_credentials",
    "ensure_triton_control_key",
    "input_hash_key_path",
    "jwks_path",
    "keys_dir",
    "mint_token",
    "nats_credentials_path",
    "rotate",
    "signing_keys",
    "triton_control_key_path",
]

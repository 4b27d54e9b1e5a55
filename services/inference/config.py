"""Settings of the inference service."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field

from libs.config import DurableBusSettings, ProviderSettings
from libs.http1.settings import HttpSettings
from services.inference.accounting import DEFAULT_UNCOUNTED_LIMIT_BYTES
from services.inference.slots import DEFAULT_MEMORY_LIMIT_BYTES
from services.inference.work_window import DEFAULT_TARGET_SECONDS


class Settings(HttpSettings, DurableBusSettings, ProviderSettings):
    """Read from the environment, prefix `HEADRACE_`."""

    stream_listen_address: str | None = Field(
        default=None,
        description="Where `ModelStreamInfer` is served: unix:/path or host:port. Unset: by the "
        "server of all other methods, where a message may have 64 MiB.",
    )
    stream_message_limit_bytes: int = Field(
        default=8 * 1024 * 1024,
        gt=0,
        description="The longest message of `ModelStreamInfer` at the stream_listen_address: "
        "messages of many streams may arrive, and be in memory, at the same time.",
    )
    max_tensor_streams: int = Field(
        default=64,
        gt=0,
        description="Calls of `ModelStreamInfer` at a time. A tenant alone may have half of them.",
    )
    router_address: str = Field(description="The router, which pushes routes.")
    cost_address: str = Field(description="The cost service, which pushes prices.")
    stall_first_token_seconds: float = Field(
        default=60.0,
        description="A backend without a first token for so long has failed. For answers "
        "that are not streamed the limit is at least 300 s.",
    )
    stall_between_tokens_seconds: float = Field(
        default=15.0, description="A backend without a further token for so long has failed."
    )
    coalesce_max_delay_seconds: float = Field(
        default=0.020,
        ge=0,
        description="If a reader or this process lags, tokens are held back for at most so long.",
    )
    slow_reader_seconds: float = Field(
        default=60.0,
        ge=0,
        description="An answer ends if its client reads nothing for so long. 0: never.",
    )
    provider_ca_file: Path | None = Field(
        default=None,
        description="Certificates (PEM) of private authorities that providers' certificates may "
        "have, besides those of the machine.",
    )
    provider_https_proxy: str = Field(
        default="",
        repr=False,  # it may have a password
        validation_alias=AliasChoices("HEADRACE_PROVIDER_HTTPS_PROXY", "HTTPS_PROXY"),
        description="The proxy to providers with https URLs, http://[USER:PASSWORD@]HOST:PORT.",
    )
    provider_http_proxy: str = Field(
        default="",
        repr=False,
        validation_alias=AliasChoices("HEADRACE_PROVIDER_HTTP_PROXY", "HTTP_PROXY"),
        description="The proxy to providers with http URLs.",
    )
    provider_no_proxy: str = Field(
        default="",
        validation_alias=AliasChoices("HEADRACE_PROVIDER_NO_PROXY", "NO_PROXY"),
        description="Providers that are reached directly: names with their subdomains, addresses, "
        "networks, each with a port where it matters, separated by commas.",
    )
    request_memory_limit_bytes: int = Field(
        default=DEFAULT_MEMORY_LIMIT_BYTES,
        ge=192 * 1024 * 1024,
        description="Most memory for the inputs of all requests that wait or run. A tenant alone "
        "gets half of it. A tensor request needs three times its size, 192 MiB at most; one "
        "that needs more than half of the limit waits until no other request holds anything.",
    )
    uncounted_prompts_limit_bytes: int = Field(
        default=DEFAULT_UNCOUNTED_LIMIT_BYTES,
        ge=0,
        description="Most memory for prompts whose callers left before the model reported their "
        "tokens, until they are counted. A tenant alone gets half of it; its further prompts are "
        "billed by an estimate, one token for 4 bytes.",
    )
    backend_target_seconds: float = Field(
        default=DEFAULT_TARGET_SECONDS,
        gt=0,
        description="How long requests may take at a backend that is not a chat model while others "
        "wait for it. Longer: larger batches. Shorter: others wait less. Set it to twice the time "
        "of one batch, and times the instances of the model.",
    )
    tenant_weights: str = Field(
        default="",
        pattern=r"^\s*([A-Za-z0-9._@+-]{1,128}=[1-9][0-9]{0,3}\s*)*$",
        description="Shares of tenants where requests wait, such as `acme=4 beta=2`; all others "
        "have 1.",
    )
    hedge_after_seconds: float = Field(
        default=0.0,
        description="A second backend is called if no token came for so long. 0: never.",
    )
    hedge_max_share: float = Field(
        default=0.05,
        description="The largest share of all requests that is sent to a second backend.",
    )

    def weights_of_tenants(self) -> dict[str, float]:
        """Returns the weights by tenant."""
        pairs = (entry.split("=") for entry in self.tenant_weights.split())
        return {tenant: float(weight) for tenant, weight in pairs}

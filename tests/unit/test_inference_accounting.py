"""What is billed of requests whose callers left."""

from __future__ import annotations

import asyncio
from typing import Any

from headrace.common.v1.model_pb2 import MODEL_KIND_CHAT, ModelSchema
from headrace.router.v1.router_internal_pb2 import RouteTarget

from libs.clock import SystemClock
from libs.routes import Choice
from libs.rpc.identity import Identity
from libs.telemetry.hashing import InputHasher
from services.inference.accounting import Outcome, Recorder, UncountedPrompt
from services.inference.domain import TokenUsage
from services.inference.slots import REQUEST_OVERHEAD_BYTES
from tests.support.tensor_mesh import Bills

PROMPT_BYTES = 4 * REQUEST_OVERHEAD_BYTES
HELD_BYTES = PROMPT_BYTES + REQUEST_OVERHEAD_BYTES
CONTEXT_TOKENS = 4096


def outcome(tenant: str) -> Outcome:
    target = RouteTarget(
        deployment="deployments/m",
        model_version="models/m/versions/1.0.0",
        schema=ModelSchema(kind=MODEL_KIND_CHAT, context_tokens=CONTEXT_TOKENS),
    )
    return Outcome(
        operation="generate",
        request_id="r",
        identity=Identity(tenant, "ann"),
        choice=Choice(target=target, reason="", model="m", epoch="e", revision=1),
        usage=TokenUsage(completion_tokens=1),
        inputs=(),
        started_seconds=0.0,
    )


def recorder_of(bills: Bills, *, limit_bytes: int) -> Recorder:
    usage: Any = bills
    return Recorder(
        usage=usage,
        hasher=InputHasher(bytes(32)),
        clock=SystemClock(),
        uncounted_limit_bytes=limit_bytes,
    )


async def test_a_tenant_has_few_prompts_to_be_counted_and_others_are_estimated():
    """Callers who leave all the time make neither endless counts nor free prompts."""
    bills, may_count, counting = Bills(), asyncio.Event(), 0

    async def count() -> int:
        nonlocal counting
        counting += 1
        await may_count.wait()
        return 7

    recorder = recorder_of(bills, limit_bytes=4 * HELD_BYTES)
    for _ in range(20):
        recorder.record_later(outcome("flood"), prompt=UncountedPrompt(PROMPT_BYTES, count))
    recorder.record_later(outcome("victim"), prompt=UncountedPrompt(PROMPT_BYTES, count))
    await asyncio.sleep(0.05)
    assert counting == 3
    may_count.set()
    await recorder.drain()
    billed = [(event["identity"].tenant, event["usage"].prompt_tokens) for event in bills.recorded]
    assert billed.count(("flood", CONTEXT_TOKENS)) == 18
    assert billed.count(("flood", 7)) == 2
    assert billed.count(("victim", 7)) == 1
    assert recorder._uncounted.used == 0


async def test_an_estimate_is_a_token_for_four_bytes():
    """As for the order of requests."""
    bills = Bills()
    recorder = recorder_of(bills, limit_bytes=0)

    async def count() -> int:
        raise AssertionError

    recorder.record_later(outcome("acme"), prompt=UncountedPrompt(400, count))
    await recorder.drain()
    (bill,) = bills.recorded
    assert bill["usage"].prompt_tokens == 101

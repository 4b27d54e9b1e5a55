"""Calls to what runs the models: Triton servers, and external providers with OpenAI's HTTP API.

Other packages use `pool.Backends`, which picks a backend for each attempt and hands it out as a
`Lease`; the protocols in `chat`; `stall.StallLimits`; `targets.target_of`, the only reader of a
backend's kind; and `triton.codec` for the JSON that models report. The rest is internal: `breaker`
keeps requests away from backends that fail, `stall` ends silent streams, `triton` and `openai_http`
are the two clients.
"""

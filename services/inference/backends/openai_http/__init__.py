"""A provider with OpenAI's HTTP API as a backend.

`client` sends requests and has the API keys of `api_keys`; `response` reads a successful response
with the parsers of `sse`; `errors` decides whose fault an unsuccessful one is. Only `pool` makes a
`client.Provider`; others get it from a lease.
"""

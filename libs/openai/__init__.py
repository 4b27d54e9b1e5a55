"""OpenAI's HTTP API as bytes: reads request bodies, writes responses, events and errors.

It knows nothing of models or HTTP servers. Services that serve a part of the API use `bodies` for
paths and common objects, `fields` to read a body, `errors` for whatever fails, `chat_request` and
`chat_response` for chat completions; the edge uses the paths and errors.
"""

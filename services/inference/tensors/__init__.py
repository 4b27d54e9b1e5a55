"""Requests that are not generated token by token here: they are retried, never continued.

The API uses `oip.OpenInference` (tensors as they come, with routes and bills), `embed.Embedder` and
`count_tokens.TokenCounter`. All of them make their attempts through `retry.Retrier`; `calls` and
`codec` belong to the Open Inference Protocol.
"""

"""One answer, from its route to its bill.

`generator.Generator` is for the APIs. Under it, each module adds one kind of recovery: `fallback`
(another deployment), `failover` (another backend), `hedging` (a second backend at the same time).
`relay` is the buffer between the backend and the client.
"""

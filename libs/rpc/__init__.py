"""Servers and clients of the mesh: everything between a servicer and the network.

Servers: `server` (gRPC), `http_api` with `http_call` and `http_dialect` (HTTP routes), `grpc_http1`
(gRPC over HTTP/1.1). All of them run calls through `served_call`, which only they use. Callers use
`channel`, `watch` and `latest`; both sides use `identity`, `status`, `names` and `paging`. Import
these modules: the package itself imports nothing, so that a process loads only what it needs.
"""

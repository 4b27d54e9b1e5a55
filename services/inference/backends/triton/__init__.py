"""A Triton server as a backend: `client` calls it, `codec` has the tensors, `errors` the errors.

Only `pool` makes a `client.Triton`; others get it from a lease.
"""

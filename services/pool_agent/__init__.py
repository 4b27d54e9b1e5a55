"""Brings one Triton server to what the registry asks of its pool.

Run one with `python -m services.pool_agent` beside each Triton server. Other services see its work
in the registry, and import nothing from here.
"""

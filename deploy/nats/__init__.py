"""Renders the configuration of the bus, NATS, with one user for each service.

Everything that differs between deployments is a parameter. Others use `render` (`Bus`, `config`)
and the names in `users`.
"""

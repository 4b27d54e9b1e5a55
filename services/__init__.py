"""The services of the mesh: each package is one kind of process, run as `python -m services.NAME`.

Services call each other by RPC or publish events, and never import each other. Read the `README.md`
of a service first.
"""

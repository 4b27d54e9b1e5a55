"""Models, versions, artifacts and deployments: what the mesh may serve.

Run it with `python -m services.registry`. Other services call `headrace.registry.v1` and import
nothing from here.
"""

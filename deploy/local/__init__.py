"""A mesh on one machine: its folder, ports, processes and their supervisor.

Others use `layout.Layout` (which mesh), `lifecycle` (start, deploy the bundled models, stop),
`status`, `logs` and `edge.connect`. `install.py` and `preflight.py` are scripts that run before
anything is installed, on any Python 3.
"""

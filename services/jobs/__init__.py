"""The jobs service: accepts work that can wait, keeps its record, and reports what came of it.

Run it with `python -m services.jobs`. Other code calls `headrace.jobs.v1` and imports nothing from
here. Start with `README.md`, then `domain.py`.
"""

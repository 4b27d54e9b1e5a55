"""The worker: runs jobs through the services that users call, and reports what came of them.

Run it with `python -m services.worker`. It serves no RPCs, and other code imports nothing from
here. Start with `README.md`, then `runner.py`.
"""

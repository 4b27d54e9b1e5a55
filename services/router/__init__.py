"""Decides which deployment answers a request, and sends the routes to where requests are.

Run it with `python -m services.router`. Other services call `headrace.router.v1` and import nothing
from here; the look-up that they share with it is `libs.routes`.
"""

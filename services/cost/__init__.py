"""The cost service: prices, and the ledger of what every request cost.

Other code calls it by RPC (`headrace.cost.v1`) and publishes usage events with `libs.metering`; it
imports nothing from here. Start with `README.md`, then `domain.py`.
"""

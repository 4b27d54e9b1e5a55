"""Pricing and recording of usage, in the service that serves a request.

Others may use:

* `usage.UsageRecorder` prices the usage of a request and makes its event durable.
* `prices.PriceBook` holds the prices that `cost` pushes.
* `pricing` has the arithmetic, in plain Python, which the ledger of `cost` shares.
"""

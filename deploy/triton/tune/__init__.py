"""Measures settings of a bundled model on this machine and chooses the best.

Others use `session.tune` with its `Options` and callbacks, `settings.parse_axes` and the names in
`report`. Nothing here prints.
"""

"""The `headrace` command: one file for each group of commands, with the tables that they print.

Commands are thin: what they do is in `deploy`. Nothing imports this package.
"""

"""Requests for generated answers: their fields, and the rules that every service applies to them.

`request` is plain Python, `wire` reads the protos. `inference` checks what it runs, `jobs` checks
what it accepts; with the same rules both refuse the same requests.
"""

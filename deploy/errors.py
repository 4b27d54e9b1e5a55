"""The error whose message the command line prints without a traceback."""

from __future__ import annotations


class CliError(Exception):
    """A command cannot do what the user asked. The message says why and what to do."""

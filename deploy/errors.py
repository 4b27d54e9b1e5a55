"""The error that a user of the command line sees."""

from __future__ import annotations


class CliError(Exception):
    """A command cannot do what it was asked for; the message says why and what to do."""

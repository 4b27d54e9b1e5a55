"""Logs, traces and metrics: what a process says about itself, never the inputs it was given."""

from __future__ import annotations

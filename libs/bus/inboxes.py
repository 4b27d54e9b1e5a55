"""The subjects on which a client receives answers and the messages that it pulls."""

from __future__ import annotations


def inbox_prefix(user: str) -> str:
    """Returns the prefix of a user's inboxes: no other user may subscribe to them."""
    return f"_INBOX.{user}" if user else "_INBOX"

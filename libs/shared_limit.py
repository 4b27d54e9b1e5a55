"""A limit that many holders, such as tenants, share, so that none of them can take all of it.

The rule is that of dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for
shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998): a holder may
take more as long as it holds less than `alpha` times what is free. A holder alone gets
alpha / (1 + alpha) of the limit, n busy holders get alpha / (1 + n * alpha) each, and the rest
stays free for the next one, which never has to wait until the others release something.
"""

from __future__ import annotations


class SharedLimit:
    """Counts what each holder holds, in constant time; stores nothing about holders without any.

    Attributes:
        limit: the most that all holders hold together; may be changed at any time.
        used: what they hold now.
    """

    __slots__ = ("_alpha", "_held", "limit", "used")

    def __init__(self, limit: int, *, alpha: float) -> None:
        self.limit = limit
        self.used = 0
        self._alpha = alpha
        self._held: dict[str, int] = {}

    def has_room(self, holder: str, amount: int = 1) -> bool:
        """Returns whether `take` would succeed."""
        free = self.limit - self.used
        if amount > free:
            return False
        if held := self._held.get(holder, 0):
            # As if it took one after the other: the threshold holds for the last one, too.
            return held + amount - 1 < self._alpha * (free - amount + 1)
        return not self.used or amount - 1 < self._alpha * (self.limit - amount + 1)

    def take(self, holder: str, amount: int = 1) -> bool:
        """Takes more for a holder; returns False, and takes nothing, if that is beyond its share.

        A holder that holds nothing gets any amount that is free, up to the share of a holder alone;
        a larger one only while nobody holds anything.
        """
        if not self.has_room(holder, amount):
            return False
        self._held[holder] = self._held.get(holder, 0) + amount
        self.used += amount
        return True

    def release(self, holder: str, amount: int = 1) -> None:
        """Releases what a holder has taken."""
        held = self._held[holder] - amount
        self.used -= amount
        if held:
            self._held[holder] = held
        else:
            del self._held[holder]

    def held_by(self, holder: str) -> int:
        """Returns what a holder holds."""
        return self._held.get(holder, 0)

    def share_of(self, holder: str) -> int:
        """Returns the most that a holder can hold while the others hold what they hold now."""
        available = self.limit - self.used + self.held_by(holder)
        return max(0, int(self._alpha * available / (1 + self._alpha)))

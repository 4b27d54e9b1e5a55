"""A limit that many parties share, so that none of them can take all of it.

The rule is that of dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for
shared-memory packet switches", IEEE/ACM Transactions on Networking 6(2), 1998): a party may take
more as long as it holds less than `alpha` times what is free. A party alone gets
alpha / (1 + alpha) of the limit, n busy parties get alpha / (1 + n * alpha) each, and the rest
stays free for the next one, who never has to wait until the others give something back.
"""

from __future__ import annotations


class SharedLimit:
    """Counts what each party holds. Takes constant time and keeps nothing of parties without any.

    Attributes:
        limit: the most that all parties hold together; may be changed at any time.
        used: what they hold now.
    """

    __slots__ = ("_alpha", "_held", "limit", "used")

    def __init__(self, limit: int, *, alpha: float) -> None:
        self.limit = limit
        self.used = 0
        self._alpha = alpha
        self._held: dict[str, int] = {}

    def has_room(self, party: str, amount: int = 1) -> bool:
        """Returns whether `take` would succeed."""
        free = self.limit - self.used
        if amount > free:
            return False
        if held := self._held.get(party, 0):
            # As if it took one after the other: the threshold holds for the last one, too.
            return held + amount - 1 < self._alpha * (free - amount + 1)
        return not self.used or amount - 1 < self._alpha * (self.limit - amount + 1)

    def take(self, party: str, amount: int = 1) -> bool:
        """Gives a party more; returns False, and changes nothing, where that is beyond its share.

        A party that holds nothing gets any amount that is free, up to the share of a party alone;
        a larger one only while nobody holds anything.
        """
        if not self.has_room(party, amount):
            return False
        self._held[party] = self._held.get(party, 0) + amount
        self.used += amount
        return True

    def release(self, party: str, amount: int = 1) -> None:
        """Takes back what a party was given."""
        held = self._held[party] - amount
        self.used -= amount
        if held:
            self._held[party] = held
        else:
            del self._held[party]

    def held_by(self, party: str) -> int:
        """Returns what a party holds."""
        return self._held.get(party, 0)

    def share_of(self, party: str) -> int:
        """Returns the most that a party can hold while the others hold what they hold now."""
        available = self.limit - self.used + self.held_by(party)
        return max(0, int(self._alpha * available / (1 + self._alpha)))

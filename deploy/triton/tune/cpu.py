"""Who used the cores while something was measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

# More than this, taken by others, moves the figures by more than what is looked for.
QUIET_CORES = 0.2


@dataclass(frozen=True, kw_only=True)
class CpuUsed:
    """CPU seconds, up to a moment or between two.

    Attributes:
        triton_seconds: of Triton and its models.
        own_seconds: of this process, whose clients are part of what is measured.
        machine_seconds: of all processes.
    """

    at_seconds: float
    triton_seconds: float
    own_seconds: float
    machine_seconds: float

    @classmethod
    def now(cls, *, triton_seconds: float) -> CpuUsed:
        """Returns what was used until now."""
        times = psutil.cpu_times()
        return cls(
            at_seconds=time.monotonic(),
            triton_seconds=triton_seconds,
            own_seconds=time.process_time(),
            machine_seconds=sum(times) - times.idle - times.iowait - times.guest - times.guest_nice,
        )

    def since(self, before: CpuUsed) -> CpuUsed:
        """Returns what was used between two moments."""
        return CpuUsed(
            at_seconds=self.at_seconds - before.at_seconds,
            triton_seconds=self.triton_seconds - before.triton_seconds,
            own_seconds=self.own_seconds - before.own_seconds,
            machine_seconds=self.machine_seconds - before.machine_seconds,
        )

    @property
    def neighbours_cores(self) -> float:
        """How many cores others kept busy, of what lies between two moments."""
        others = self.machine_seconds - self.triton_seconds - self.own_seconds
        return max(0.0, others / self.at_seconds)

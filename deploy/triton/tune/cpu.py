"""The CPU time that was used during a measurement, and by which programs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil

# More than this, used by other programs, changes the figures more than the settings do.
QUIET_CORES = 0.2


@dataclass(frozen=True, kw_only=True)
class CpuUsed:
    """CPU seconds up to a time or between two times.

    Attributes:
        at_seconds: the time, or the time between.
        triton_seconds: of Triton and its models.
        own_seconds: of this process, which runs the clients.
        machine_seconds: of all processes.
    """

    at_seconds: float
    triton_seconds: float
    own_seconds: float
    machine_seconds: float

    @classmethod
    def now(cls, *, triton_seconds: float) -> CpuUsed:
        """Returns the CPU time used until now."""
        times = psutil.cpu_times()
        return cls(
            at_seconds=time.monotonic(),
            triton_seconds=triton_seconds,
            own_seconds=time.process_time(),
            machine_seconds=sum(times) - times.idle - times.iowait - times.guest - times.guest_nice,
        )

    def since(self, before: CpuUsed) -> CpuUsed:
        """Returns the CPU time used since then."""
        return CpuUsed(
            at_seconds=self.at_seconds - before.at_seconds,
            triton_seconds=self.triton_seconds - before.triton_seconds,
            own_seconds=self.own_seconds - before.own_seconds,
            machine_seconds=self.machine_seconds - before.machine_seconds,
        )

    @property
    def neighbours_cores(self) -> float:
        """The average number of cores that other programs used, of a difference."""
        others = self.machine_seconds - self.triton_seconds - self.own_seconds
        return max(0.0, others / self.at_seconds)

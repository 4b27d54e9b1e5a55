"""The jobs service and workers as processes on a real bus, with fake models."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.edge import serving
from tests.support.jobs import Bus, JobClient, Models, job_bus
from tests.support.nats import NatsServer, running_nats
from tests.support.service import RunningService, running_service


@dataclass
class JobMesh:
    """A bus, fake models and a jobs service that run; the test starts workers."""

    nats: NatsServer
    bus: Bus
    models: Models
    models_address: str
    jobs: RunningService
    client: JobClient
    _home: Path
    _stack: AsyncExitStack

    async def worker(self, **env: str) -> RunningService:
        """Starts one more worker; it is stopped with the test at the latest."""
        home = self._home / f"worker-{len(list(self._home.iterdir()))}"
        home.mkdir()
        settings = {
            "HEADRACE_NATS_URL": self.nats.url,
            "HEADRACE_INFERENCE_ADDRESS": self.models_address,
            "HEADRACE_EMBEDDING_CACHE_ADDRESS": self.models_address,
            "HEADRACE_JOBS_ADDRESS": self.jobs.address,
            "HEADRACE_COST_ADDRESS": self.models_address,
            **env,
        }
        running = running_service("worker", home, preexec=None, **settings)
        return await self._stack.enter_async_context(running)


@asynccontextmanager
async def job_mesh(home: Path, **env: str) -> AsyncIterator[JobMesh]:
    """Runs the bus, the jobs service and models; `env` is for the jobs service."""
    for name in ("nats", "jobs", "workers"):
        (home / name).mkdir()
    models = Models()  # type: ignore[abstract]  # what it does not define answers UNIMPLEMENTED
    async with AsyncExitStack() as stack:
        nats = await stack.enter_async_context(running_nats(home / "nats"))
        bus = await stack.enter_async_context(job_bus(nats.url))
        address = await stack.enter_async_context(serving(models.register))
        settings = {"HEADRACE_NATS_URL": nats.url, **env}
        jobs = await stack.enter_async_context(
            running_service("jobs", home / "jobs", preexec=None, **settings)
        )
        channel = await stack.enter_async_context(jobs.channel())
        yield JobMesh(
            nats=nats,
            bus=bus,
            models=models,
            models_address=address,
            jobs=jobs,
            client=JobClient(channel),
            _home=home / "workers",
            _stack=stack,
        )

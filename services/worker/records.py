"""What the jobs service knows of a job that comes to us."""

from __future__ import annotations

import structlog
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from libs.errors import DeadlineExceeded, NotFound, Unavailable
from libs.rpc.identity import Identity
from libs.rpc.status import headrace_errors

_log = structlog.get_logger()

_ENDED = (jobs_pb2.JobState.JOB_STATE_SUCCEEDED, jobs_pb2.JobState.JOB_STATE_FAILED)

# A first delivery is not held up by a jobs service that is away. For a later one it is waited for:
# the attempt before may have ended the job and died before it could say so to the bus.
FIRST_TIMEOUT_SECONDS = 1.0
AGAIN_TIMEOUT_SECONDS = 10.0


class JobRecords:
    """Asks the jobs service."""

    def __init__(self, jobs: jobs_pb2_grpc.JobServiceAsyncStub) -> None:
        self._jobs = jobs

    async def has_ended(self, job: events_pb2.JobSubmitted, *, attempt: int) -> bool:
        """Whether the job needs no work; if nobody can tell, it is taken to need some.

        Raises:
            HeadraceError: the jobs service answers with another error than that it is away.
        """
        again = attempt > 1
        try:
            with headrace_errors():
                response = await self._jobs.GetJob(
                    jobs_pb2.GetJobRequest(name=f"jobs/{job.job_id}"),
                    metadata=Identity(job.identity.tenant, job.identity.user).metadata(),
                    timeout=AGAIN_TIMEOUT_SECONDS if again else FIRST_TIMEOUT_SECONDS,
                    wait_for_ready=again,
                )
        except NotFound:
            _log.error("job without a record", job_id=job.job_id)
            return True
        except (Unavailable, DeadlineExceeded) as error:
            _log.warning("job not looked up", job_id=job.job_id, error=repr(error))
            return False
        return response.job.state in _ENDED

"""Asks the jobs service whether a job still needs work."""

from __future__ import annotations

import structlog
from headrace.events.v1 import events_pb2
from headrace.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from libs.errors import DeadlineExceeded, NotFound, Unavailable
from libs.rpc.status import headrace_errors
from services.worker.identity import create_time_of, identity_of_job

_log = structlog.get_logger()

_OPEN = (jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING)

# A first delivery does not wait for a jobs service that is away. A later one does: the attempt
# before may have ended the job without acknowledging its message.
FIRST_TIMEOUT_SECONDS = 1.0
AGAIN_TIMEOUT_SECONDS = 10.0


class JobRecords:
    """Reads job records."""

    def __init__(self, jobs: jobs_pb2_grpc.JobServiceAsyncStub) -> None:
        self._jobs = jobs

    async def has_ended(self, job: events_pb2.JobSubmitted, *, attempt: int) -> bool:
        """Returns whether the job needs no work; False if the jobs service is away.

        Raises:
            HeadraceError: the jobs service answers with another error.
        """
        again = attempt > 1
        try:
            with headrace_errors():
                response = await self._jobs.GetJob(
                    jobs_pb2.GetJobRequest(name=f"jobs/{job.job_id}", view=jobs_pb2.JOB_VIEW_BASIC),
                    metadata=identity_of_job(job).metadata(),
                    timeout=AGAIN_TIMEOUT_SECONDS if again else FIRST_TIMEOUT_SECONDS,
                    wait_for_ready=again,
                )
        except NotFound:
            _log.info("job was deleted, or has expired", job_id=job.job_id)
            return True
        except (Unavailable, DeadlineExceeded) as error:
            _log.warning("job not looked up", job_id=job.job_id, error=error)
            return False
        accepted = create_time_of(job)
        if accepted is not None and response.job.create_time != accepted:
            _log.info("job was deleted, and its id is used again", job_id=job.job_id)
            return True
        return response.job.state not in _OPEN

"""Submit a job to a running cluster by its dashboard: checks first, its log as it grows, its exit code."""

import logging
import shlex
import time
import uuid
from pathlib import Path
from typing import Any

from pydantic import Field

from acsr_ray.config import JOBS, ConfigError, JobSettings, did_you_mean
from acsr_ray.distributed.dashboard import Dashboard, SubmitError, find_address, open_dashboard
from acsr_ray.distributed.following import Asked, JobInterruptedError, asked_to_stop, conclusion, follow
from acsr_ray.distributed.upload import job_environment

logger = logging.getLogger(__name__)

PROGRAM = "exec python -m acsr_ray.cli"
"""`exec`: signals and exit code are the driver's own, not those of a shell around it."""

BUSY_S = 120.0
"""How long a dashboard that is busy is asked again to take a job."""
AGAIN_S = 2.0


class SubmitSettings(JobSettings):
    """Submit a job to a Ray cluster: `acsr-ray submit [OPTIONS] -- OPTIONS OF THE JOB`; its log is shown.

    Ends with the job's exit code: 0 done, 75 stopped before the end (submit again), 2 settings or input that
    cannot work, 1 failed. Ctrl-C and SIGTERM stop the job cleanly.
    """

    job: str = "purify_corpus"
    """Which job; its options follow a lone `--`."""
    address: str | None = None
    """The dashboard, http://HOST:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS (a bare HOST:PORT is the
    head's own, which tells its dashboard), then this machine."""
    arguments: tuple[str, ...] = ()
    """Options of the job; on the command line they stand after a lone `--`."""
    working_dir: str | None = None
    """Folder with the code to run, such as a clone; default: the package installed on the cluster."""
    exclude: tuple[str, ...] = ()
    """Patterns of files in the working directory that stay here, as in .gitignore, which also counts."""
    runtime_env: Path | None = None
    """YAML file with a Ray runtime environment for the job, such as `env_vars`; never with secrets."""
    stop_wait_s: int = Field(40, ge=1)
    """Seconds that a stop gives the job before it is killed; a clean stop takes up to 30."""
    attempts: int = Field(1, ge=1)
    """Submissions at most: again after exit code 75 or a killed driver, never after a stop on request."""
    retry_wait_s: float = Field(30.0, ge=0)
    """Seconds between two attempts."""
    detach: bool = False
    """Leave as soon as the job is submitted."""


def submit(settings: SubmitSettings) -> dict[str, Any]:
    """Submit a job and follow it to its end.

    Raises:
        SubmitError: the cluster cannot be used, or the job's settings or input cannot work (exit code 2).
        ResumableStop: the job stopped before its end (75).
        FailedError: the job failed (1).
    """
    job = settings.job.replace("-", "_")
    if job not in JOBS:
        raise ConfigError(f"unknown job {settings.job!r}{did_you_mean(job, JOBS)}")
    settings = settings.model_copy(update={"job": job})
    dashboard = open_dashboard(find_address(settings.address))
    environment = job_environment(
        settings.runtime_env, settings.working_dir, settings.exclude, settings.stop_wait_s
    )
    summary: dict[str, Any] = {
        "job": settings.job,
        "address": dashboard.address,
        "authentication": dashboard.authentication,
        "ray": dashboard.ray_version,
    }
    if settings.detach:
        name = _send(settings, dashboard, environment, Asked())
        return {**summary, "submission": name, "status": "SUBMITTED", "attempts": 1}
    attempt = 1
    with asked_to_stop() as asked:
        while True:
            try:
                name = _run_once(settings, dashboard, environment, asked)
            except JobInterruptedError as error:
                if attempt == settings.attempts or asked.is_made:
                    raise
                logger.warning("attempt %d of %d: %s", attempt, settings.attempts, error)
                asked.wait(settings.retry_wait_s)
                if asked.is_made:
                    raise
                attempt += 1
            else:
                return {**summary, "submission": name, "status": "SUCCEEDED", "attempts": attempt}


def _run_once(
    settings: SubmitSettings, dashboard: Dashboard, environment: dict[str, Any], asked: Asked
) -> str:
    name = _send(settings, dashboard, environment, asked)
    details = follow(dashboard.client, name, settings.stop_wait_s, asked)
    error = conclusion(details)
    if error is not None:
        raise error
    return name


def _send(settings: SubmitSettings, dashboard: Dashboard, environment: dict[str, Any], asked: Asked) -> str:
    """Submit the job once and return its id; a dashboard that is busy is asked again."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    name = f"acsr-{settings.job.replace('_', '-')}-{stamp}-{uuid.uuid4().hex[:6]}"
    ends, tries = time.monotonic() + BUSY_S, 0
    while True:
        tries += 1
        try:
            dashboard.client.submit_job(
                entrypoint=f"{PROGRAM} {shlex.join([settings.job, *settings.arguments])}",
                submission_id=name,
                runtime_env=environment,
                metadata={"acsr_job": settings.job},
            )
        except SubmitError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            if tries > 1 and "already exists" in str(error):
                # The answer to an earlier try was lost on its way.
                break
            # A head that has just started, or has much to do, has no agent to take a job.
            if not isinstance(error, OSError) and "status code 5" not in str(error):
                raise SubmitError(f"{dashboard.address} does not take the job: {error}") from None
            if time.monotonic() > ends or asked.is_made:
                told = str(error).rstrip(". ")
                raise JobInterruptedError(
                    f"{dashboard.address} does not take the job now: {told}; submit it again"
                ) from None
            asked.wait(AGAIN_S)
        else:
            break
    logger.info("submitted %s; `ray job stop %s` stops it from elsewhere", name, name)
    return name
